"""Encoders with positions of their own kind, and reordered patches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import jeton
import tiny
import tiny_encoders
from dropping import BLOCK, Dropping
from jeton.engine import apply, watch
from jeton.engine.encoder import EncoderSite
from jeton.models import Encoder, adapt, aimv2
from jeton.tokens import Reduction
from tiny_aimv2 import tiny_aimv2
from tiny_vit_msn import tiny_vit_msn

VARIANTS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: make
        for name, make in tiny_encoders.BUILDERS.items()
        if name not in ("VisionTransformerDistilled", "SamVisionEncoder")
    },
    "Aimv2VisionModel": tiny_aimv2,
    "ViTMSNModel": tiny_vit_msn,
    "BeitModel-shared": lambda: tiny_encoders.tiny_beit(
        use_relative_position_bias=False, use_shared_relative_position_bias=True, use_absolute_position_embeddings=True
    ),
    "DINOv3ViTModel-gated": lambda: tiny_encoders.tiny_dinov3(use_gated_mlp=True, key_bias=True),
}


class Hiding(TorchFunctionMode):
    """Attention calls from the BLOCKth on do not see hidden keys (B, N)."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden, self.calls = hidden[:, None, None], 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.calls += 1
            if self.calls > BLOCK:
                mask = kwargs.get("attn_mask")
                mask = torch.zeros(()) if mask is None else mask
                kwargs = {**kwargs, "attn_mask": mask.masked_fill(self.hidden, -torch.inf)}
        return func(*args, **kwargs)


def sized(net: nn.Module, wide: bool) -> tiny.Inputs:
    """The usual pictures, or wide ones for families that take any size."""
    if not wide:
        return tiny.inputs_for(net)
    view = adapt(net)
    if not view.resizable:
        pytest.skip("takes one size only")
    inputs = {view.argument: torch.randn(3, 3, 5 * tiny.PATCH, 9 * tiny.PATCH)}
    if "interpolate_pos_encoding" in inspect.signature(net.forward).parameters:
        inputs["interpolate_pos_encoding"] = True
    return {**inputs, "noise": torch.arange(45.0).expand(3, -1)} if type(net).__name__ == "ViTMAEModel" else inputs


def both(name: str, wide: bool) -> tuple[Tensor, Tensor]:
    """Tokens of a run that dropped some, and those of the whole model in which nobody sees the dropped ones."""
    net, method = VARIANTS[name](), Dropping()
    inputs = sized(net, wide)
    with apply(net, method):
        short = tiny.run(net, inputs)
    whole = tiny.run(net, inputs)
    hidden = torch.ones(whole.shape[:2], dtype=torch.bool).scatter(1, method.kept, False)
    with Hiding(hidden) as mode:
        masked = tiny.run(net, inputs)
    assert mode.calls == 5 + (name == "Aimv2VisionModel")  # its head asks once more
    kept = method.kept[..., None].expand(-1, -1, whole.shape[-1])
    assert not torch.allclose(short, whole.gather(1, kept), atol=1e-3)
    return short, masked.gather(1, kept)


@pytest.mark.parametrize("wide", [False, True], ids=["usual", "wide"])
@pytest.mark.parametrize("name", VARIANTS)
def test_removing_inside_the_encoder_equals_masking(name: str, wide: bool) -> None:
    short, masked = both(name, wide)
    torch.testing.assert_close(short, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "BeitModel", "BeitModel-shared"])
def test_positions_of_the_first_tokens_in_place_of_those_left_differ(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: RoPE and relative bias merely cut to length."""
    trim = EncoderSite._trim

    def first(self: EncoderSite, value: Any) -> Any:
        own, self.reduction = (
            self.reduction,
            self.reduction
            and Reduction.keep(torch.arange(self.reduction.k).expand(3, -1), self.reduction.n, prefix=self.encoder.prefix),
        )
        try:
            return trim(self, value)
        finally:
            self.reduction = own

    monkeypatch.setattr(EncoderSite, "_trim", first)
    short, masked = both(name, False)
    assert (short - masked).abs().max() > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_patches_are_listed_in_the_order_of_the_tokens(name: str) -> None:
    """The pixels of each patch, multiplied by the weights of the patch embedding, are what the embedding makes."""
    net = VARIANTS[name]()
    view = adapt(net)
    assert isinstance(view, Encoder)
    convolution = next(part for part in net.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
    pixels = tiny.inputs_for(net)[view.argument]
    made: list[Tensor] = []
    handle = convolution.register_forward_hook(lambda module, args, output: made.append(output))
    tiny.run(net, tiny.inputs_for(net))
    handle.remove()
    patches = view.patches(pixels)
    mine = patches.flatten(2) @ convolution.weight.flatten(1).T + convolution.bias
    torch.testing.assert_close(mine, made[0].flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    assert [len(item) for item in view.geometry({"pixel_values": pixels})] == [patches.shape[1]] * 3


# -- ViT-MAE -----------------------------------------------------------------------------------------------------------------


def test_vit_mae_has_the_features_of_its_own_shuffled_forward_in_the_order_of_the_picture() -> None:
    net = tiny.model("ViTMAEModel")
    pixels = tiny.inputs_for(net)["pixel_values"]
    with torch.no_grad():
        own = net(pixel_values=pixels)
        restored = own.last_hidden_state[:, 1:].gather(1, own.ids_restore[..., None].expand(-1, -1, 32))
        with watch(net):
            mine = net(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(mine, restored, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine, own.last_hidden_state[:, 1:], atol=1e-2)


def test_vit_mae_that_hides_patches_or_paints_them_again_is_refused() -> None:
    hiding = transformers.ViTMAEModel(transformers.ViTMAEConfig(**tiny.vision()))
    with pytest.raises(jeton.Unsupported, match=r"hides 75% of the patches.*mask_ratio = 0"):
        apply(hiding, "tome")
    sizes = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    whole = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**tiny.vision(mask_ratio=0.0, **sizes)))
    with pytest.raises(jeton.Unsupported, match="paints every patch again"):
        apply(whole, "tome")


def test_vit_mae_refuses_noise_that_sorts_patches() -> None:
    net = tiny.model("ViTMAEModel")
    inputs = {**tiny.inputs_for(net), "noise": torch.rand(3, tiny.SIDE**2)}
    with apply(net, "tome(keep=0.5)"), pytest.raises(ValueError, match="let it ascend"):
        net(**inputs)


def test_videomae_refuses_tubelets_left_out_and_painting() -> None:
    net = tiny.model("VideoMAEModel")
    masked = torch.zeros(3, 32, dtype=torch.bool)
    with apply(net, "tome(keep=0.5)"), pytest.raises(ValueError, match="bool_masked_pos"):
        net(**tiny.inputs_for(net), bool_masked_pos=masked)


def test_videomae_lays_tubelets_out_in_time_and_space() -> None:
    view = adapt(tiny.model("VideoMAEModel"))
    geometry = view.geometry(tiny.inputs_for(view.model))[0]
    assert geometry.kinds == ("frame", "frame") and geometry.time.tolist() == [0] * 16 + [1] * 16
    assert geometry.row[:5].tolist() == [0, 0, 0, 0, 1] and int(geometry.height[0]) == int(geometry.width[0]) == 4
    with apply(view.model, "tome(keep=0.5)") as run:
        tiny.run(view.model, tiny.inputs_for(view.model))
        assert [grid.shape for grid in run.assignment(0)] == [(4, 4), (4, 4)]


def test_the_page_for_contributors_shows_an_adapter_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-model.md").read_text()
    assert f"<!-- encoder: begin -->\n```python\n{inspect.getsource(aimv2)}```\n<!-- encoder: end -->" in page
