"""Pictures as rows of tokens, the most telling first: One-D-Piece on handwritten digits. Needs jeton[train,demo]."""

import torch
from sklearn.datasets import load_digits

from jeton.measure.rate import psnr
from jeton.tokenizers.one_d_piece import OneDPiece
from jeton.train import Recipe, train

images = torch.tensor(load_digits().images).float()[:, None] / 16
seen, unseen = images[:1500], images[1500:]

torch.manual_seed(0)
model = OneDPiece(
    8, 2, 16, width=48, depth=2, heads=4, channels=1, levels=[8, 8], target="pixels", init_std=0.07, batch_norm=True
)  # fmt: skip
recipe = Recipe(steps=300, rate=3e-3, batch=32)  # `jeton train one-d-piece` trains for longer, on photographs too
train(model, seen, OneDPiece.first_stage, recipe, progress=False)

with torch.no_grad():
    ids = model.eval().encode(unseen).ids
    drawn = {k: model.decode(ids, k) for k in (1, 4, 16)}
for k, pictures in drawn.items():
    print(f"{k:2} tokens, {model.bytes(k):5.2f} bytes: {psnr(unseen, pictures).mean():.1f} dB")
for row in torch.cat([unseen[3], *(pictures[3] for pictures in drawn.values())], -1)[0].unflatten(-1, (-1, 8)):
    print("   ".join("".join(" .:*#"[int(4.99 * value.clamp(0, 1))] * 2 for value in part) for part in row))
