"""Networks made for few tokens, untrained: what each costs beside the network it stands for. Needs nothing to download."""

import torch
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from jeton.backbones.lookupvit import LookupViT, LookupViTConfig
from jeton.backbones.stvit import STSwin, STSwinConfig
from jeton.backbones.vim import VimConfig, VimForImageClassification
from jeton.backbones.vim_pruning import PrunedVim
from jeton.measure.counts import count

with torch.device("meta"):  # counting needs shapes only
    pixels = torch.zeros(1, 3, 224, 224)
    vit = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    print(f"ViT-S: {count(ViTForImageClassification(vit), pixel_values=pixels).macs / 1e9:.2f} GMACs")
    lookup = LookupViT(LookupViTConfig.preset("small"))
    for side in (3, 5, 7, 10):  # the same weights
        macs = count(lookup, pixels, compressed=side).macs
        print(f"  LookupViT-S with {side} x {side} compressed tokens: {macs / 1e9:.2f}")
    config = STSwinConfig.preset("small")
    swin = SwinConfig(embed_dim=96, depths=config.depths, num_heads=config.num_heads)
    print(f"Swin-S: {count(SwinForImageClassification(swin), pixel_values=pixels).macs / 1e9:.2f} GMACs")
    print(f"  with 9 semantic tokens in each third-stage window: {count(STSwin(config), pixel_values=pixels).macs / 1e9:.2f}")

vim = VimForImageClassification(VimConfig(image_size=64, patch_size=8, hidden_size=64, num_hidden_layers=8)).eval()
pruned = PrunedVim.of(vim, ratio=0.7)  # the same weights, not copied
with torch.no_grad():
    out = pruned(torch.randn(2, 3, 64, 64))
print(f"a small Vim runs its blocks on {out.counts} tokens; those left of the first picture:")
print(out.reduction.index[0].tolist())
