"""timm's vision transformers do what transformers' own do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jeton
import tiny
import tiny_encoders
import with_timm
from jeton.engine import apply

pytestmark = pytest.mark.skipif(not with_timm.has_timm(), reason="timm or torchvision is not installed")


def the_same_vit() -> tuple[nn.Module, nn.Module]:
    """A ViT of transformers and one of timm with the same weights."""
    one = tiny.tiny_vit(layer_norm_eps=1e-6)
    with_timm.timm()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": 32, "depth": 5, "num_heads": 4, "mlp_ratio": 1.5, "img_size": 28, "patch_size": 4}
    two = VisionTransformer(**sizes, num_classes=0, global_pool="").eval()
    told = one.state_dict()

    def of(*names: str) -> Tensor:
        found = [value for name, value in told.items() if any(name.endswith(part) for part in names)]
        assert len(found) == 1, names
        return found[0]

    own = {
        "cls_token": of("cls_token"),
        "pos_embed": of("position_embeddings"),
        "patch_embed.proj.weight": of("projection.weight"),
        "patch_embed.proj.bias": of("projection.bias"),
        "norm.weight": told["layernorm.weight"],
        "norm.bias": told["layernorm.bias"],
    }
    for number in range(5):
        at = {name.split(f".{number}.", 1)[1]: value for name, value in told.items() if f".{number}." in name}
        for kind in ("weight", "bias"):
            q, k, v = (at[f"attention.{name}_proj.{kind}"] for name in "qkv")
            own |= {
                f"blocks.{number}.norm1.{kind}": at[f"layernorm_before.{kind}"],
                f"blocks.{number}.norm2.{kind}": at[f"layernorm_after.{kind}"],
                f"blocks.{number}.attn.qkv.{kind}": torch.cat([q, k, v]),
                f"blocks.{number}.attn.proj.{kind}": at[f"attention.o_proj.{kind}"],
                f"blocks.{number}.mlp.fc1.{kind}": at[f"mlp.fc1.{kind}"],
                f"blocks.{number}.mlp.fc2.{kind}": at[f"mlp.fc2.{kind}"],
            }
    two.load_state_dict(own)
    return one, two


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@torch.no_grad()
def test_timm_and_transformers_do_the_same_with_the_same_weights(fused: bool) -> None:
    """Merging by keys with proportional attention, scores of the class token, and attention received."""
    one, two = the_same_vit()
    pixels = torch.randn(3, 3, 28, 28)
    torch.testing.assert_close(two(pixels), one(pixel_values=pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    tiny.attend(two, "sdpa" if fused else "eager")
    for spec in (
        "tome(keep=0.4)",
        "evit(keep=0.5)",
        "fastervlm(keep=9)",
        "visionzip(keep=12)",
        "fastervlm(keep=9, score='received')",
    ):
        with apply(one, spec) as run, apply(two, spec) as other:
            expected, got = one(pixel_values=pixels).last_hidden_state, two(pixels)
            assert torch.equal(run.tokens.origin, other.tokens.origin), spec
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with apply(one, "tome(keep=0.4)"), apply(two, "tome(keep=0.4, proportional=False)"):
        assert (two(pixels) - one(pixel_values=pixels).last_hidden_state).abs().max() > 1e-3


def test_timm_forward_features_and_the_class_see_the_tokens_that_are_left() -> None:
    net = tiny_encoders.tiny_timm(num_classes=6, global_pool="token")
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad(), apply(net, "fastervlm", keep=9) as run:
        features = net.forward_features(pixels)
        assert features.shape == (2, 3 + 9, 32) and torch.equal(run.tokens.features, features)
        assert net(pixels).shape == (2, 6)


def test_timm_of_a_kind_that_cannot_be_read_is_refused() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    net = tiny_encoders.tiny_timm(block_fn=ParallelScalingBlock, init_values=None)
    with pytest.raises(jeton.Unsupported, match="ParallelScalingBlock"):
        apply(net, "tome")
    hiding = tiny_encoders.tiny_timm(patch_drop_rate=0.5).train()
    with pytest.raises(jeton.Unsupported, match="patch_drop_rate=0"):
        apply(hiding, "tome")
    again = tiny_encoders.tiny_timm()
    again.set_grad_checkpointing()
    with apply(again, "tome(keep=0.5)"), pytest.raises(jeton.Unsupported, match="checkpoint"):
        again(torch.randn(1, 3, 28, 28))
