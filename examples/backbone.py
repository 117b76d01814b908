"""A vision backbone: its maps for a photograph, and its counts beside the published ones. Needs jeton[timm,demo]."""

import torch
from skimage.data import astronaut

from jeton.backbones import create
from jeton.measure.counts import count

pixels = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 255
net = create("davit-tiny").eval()  # pretrained=True downloads weights
with torch.no_grad():
    for stage, features in enumerate(net.maps(pixels), 1):
        print(f"stage {stage}: {tuple(features.shape)}")

for name in ("davit-tiny", "metaformer-baselines-randformer_s12", "metaformer-baselines-caformer_s18"):
    with torch.device("meta"):  # counting needs shapes only
        net = create(name)
        found = count(net, torch.zeros(1, 3, 224, 224))
    said = net.sizes[net.size]
    print(f"{name}: {found.params:,} parameters (published {said.params:,}), {found.macs / 1e9:.2f} GMACs ({said.macs:.2f})")
