"""A dense map from fewer tokens: k-means segments of a photograph from an encoder's patch features, with all tokens, with merging
restored to every patch, and with clusters in the deeper blocks. An untrained ViT shows the mechanism; give a trained one for
segments that mean something. Writes segmentation.png. Needs jeton[demo].
"""

import torch
from PIL import Image
from skimage.data import astronaut
from sklearn.cluster import KMeans
from transformers import ViTConfig, ViTModel

import jeton

torch.manual_seed(0)
SIZE, PATCH, SEGMENTS = 448, 14, 6
shape = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
net = ViTModel(ViTConfig(image_size=SIZE, patch_size=PATCH, **shape)).eval()
torch.nn.init.zeros_(net.embeddings.position_embeddings)  # untrained positions would be noise in the map
photograph = Image.fromarray(astronaut()).resize((SIZE, SIZE))
pixels = torch.tensor(list(photograph.tobytes()), dtype=torch.float32).view(1, SIZE, SIZE, 3).permute(0, 3, 1, 2) / 127.5 - 1
side = SIZE // PATCH


@torch.no_grad()
def dense(spec: str | None) -> tuple[torch.Tensor, float]:
    """(patches, width) features of every patch of the original grid, and the share of FLOPs they took."""
    if spec is None:
        return net(pixel_values=pixels).last_hidden_state[0, 1:], 1.0
    with jeton.apply(net, spec) as run:
        net(pixel_values=pixels)
        return run.restored.features[0, 1:], run.report().flops_share


def segments(features: torch.Tensor, start: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The segment of every patch, and the centres they were found by."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    seeds = "k-means++" if start is None else start.numpy()
    found = KMeans(SEGMENTS, init=seeds, n_init=4 if start is None else 1, random_state=0).fit(unit.numpy())
    return torch.from_numpy(found.labels_), torch.from_numpy(found.cluster_centers_)


colours = torch.tensor([[230, 80, 60], [60, 120, 220], [80, 180, 90], [240, 200, 60], [150, 90, 190], [120, 120, 120]])
whole, _ = dense(None)
reference, centres = segments(whole)
tiles = [photograph]
for spec in (None, "tome(keep=0.25)", "tomesd(keep=0.3)", "elvit(keep=0.25, tau=2.0)"):
    features, flops = dense(spec)
    labels = segments(features, centres)[0]
    near = torch.nn.functional.cosine_similarity(features, whole, dim=-1).mean()
    same = (labels == reference).float().mean()
    print(f"{spec or 'all tokens'}: {flops:.0%} of the FLOPs, cosine {near:.3f} to all, {same:.0%} of patches in their segment")
    map = Image.fromarray(colours[labels].view(side, side, 3).byte().numpy()).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    tiles.append(Image.blend(photograph, map, 0.6))
sheet = Image.new("RGB", (SIZE * len(tiles), SIZE))
for number, tile in enumerate(tiles):
    sheet.paste(tile, (number * SIZE, 0))
sheet.save("segmentation.png")
