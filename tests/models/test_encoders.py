"""Encoders with positions of their own kind, heads that average, and reordered patches."""

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
import with_timm
from jeton.engine import apply, watch
from jeton.engine.encoder import EncoderSite
from jeton.method import Method, get
from jeton.models import Encoder, adapt, aimv2
from jeton.tokens import Reduction, Tokens
from tiny_aimv2 import tiny_aimv2
from tiny_vit_msn import tiny_vit_msn

BLOCK, KEPT = 2, 17
timm_is_here = pytest.mark.skipif(not with_timm.has_timm(), reason="timm or torchvision is not installed")

VARIANTS: dict[str, Callable[[], nn.Module]] = {
    **{name: make for name, make in tiny_encoders.BUILDERS.items() if name != "VisionTransformerDistilled"},
    "Aimv2VisionModel": tiny_aimv2,
    "ViTMSNModel": tiny_vit_msn,
    "BeitModel-shared": lambda: tiny_encoders.tiny_beit(
        use_relative_position_bias=False, use_shared_relative_position_bias=True, use_absolute_position_embeddings=True
    ),
    "DINOv3ViTModel-gated": lambda: tiny_encoders.tiny_dinov3(use_gated_mlp=True, key_bias=True),
}


class Dropping(Method):
    """Leaves KEPT patches in front of one block, others in each picture."""

    card = get("random").card
    site, point, spec = "block", "before", "dropping"

    def __init__(self) -> None:
        self.kept = torch.empty(0)

    def reduce(self, tokens: Tokens, signals: Any = None) -> Reduction:
        batch, n = tokens.features.shape[:2]
        draw = torch.Generator().manual_seed(5)
        patches = [torch.randperm(n - tokens.prefix, generator=draw)[:KEPT].sort().values for _ in range(batch)]
        front = torch.arange(tokens.prefix)
        self.kept = torch.stack([torch.cat([front, own + tokens.prefix]) for own in patches])
        return Reduction.keep(self.kept, n, prefix=tokens.prefix)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [self if at == BLOCK else None for at in range(depth)]

    def promise(self, n: int, depth: int = 12) -> Any:
        return get("random").promise(n, depth)


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


# -- heads that average ------------------------------------------------------------------------------------------------------


def beit_head() -> nn.Module:
    config = transformers.BeitConfig(**tiny.vision(use_relative_position_bias=True, layer_scale_init_value=0.5, num_labels=6))
    return tiny.ready(transformers.BeitForImageClassification(config))


def ijepa_head() -> nn.Module:
    return tiny.ready(transformers.IJepaForImageClassification(transformers.IJepaConfig(**tiny.vision(num_labels=6))))


def videomae_head() -> nn.Module:
    config = tiny_encoders.tiny_videomae().config
    config.use_mean_pooling, config.num_labels = True, 6
    return tiny.ready(transformers.VideoMAEForVideoClassification(config))


def timm_head(pool: str) -> nn.Module:
    return tiny_encoders.tiny_timm(num_classes=6, global_pool=pool)


def left(net: nn.Module, inputs: tiny.Inputs, spec: str) -> tuple[Tensor, Tokens]:
    """The result, and the tokens behind the last block as the run left them."""
    view, found = adapt(net), []
    with torch.no_grad(), apply(net, spec) as run:
        handle = view.blocks[-1].register_forward_hook(lambda module, args, output: found.append(output))
        result = tiny.result(net(**inputs))
        handle.remove()
        tokens = run.tokens
    return result, Tokens(found[0], tokens.mask, tokens.index, tokens.size, view.prefix)


HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "beit": (beit_head, lambda net, mean: net.classifier(net.beit.pooler.layernorm(mean))),
    "ijepa": (ijepa_head, lambda net, mean: net.classifier(mean)),
    "videomae": (videomae_head, lambda net, mean: net.classifier(net.fc_norm(mean))),
    "timm": (lambda: timm_head("avg"), lambda net, mean: net.head(net.fc_norm(mean))),
}
needs_timm = [pytest.param(name, marks=timm_is_here) if name == "timm" else name for name in HEADS]


@pytest.mark.parametrize("name", needs_timm)
def test_a_head_that_averages_counts_merged_patches_for_what_they_stand_for(name: str) -> None:
    make, head = HEADS[name]
    net = make()
    view = adapt(net)
    inputs = tiny.inputs_for(net)
    result, tokens = left(net, inputs, "tome(keep=0.4)")
    norm = net.ijepa.layernorm if name == "ijepa" else nn.Identity()
    if name == "timm":
        norm = net.norm
    x, size = norm(tokens.features)[:, view.prefix :], tokens.size[:, view.prefix :, None]
    with torch.no_grad():
        weighted, plain = head(net, (x * size).sum(1) / size.sum(1)), head(net, x.mean(1))
    assert float(size.sum(1).mean()) == (32 if name == "videomae" else 49)
    torch.testing.assert_close(result, weighted, atol=1e-5, rtol=1e-5)
    assert (result - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", needs_timm)
def test_a_head_that_averages_is_left_alone_where_nothing_was_merged(name: str) -> None:
    net = HEADS[name][0]()
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "tome(keep=1.0)"):
        assert torch.equal(tiny.run(net, inputs), before)


@timm_is_here
@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_a_head_that_takes_the_maximum_sees_the_tokens_that_are_left(pool: str) -> None:
    net = timm_head(pool)
    result, tokens = left(net, tiny.inputs_for(net), "tome(keep=0.4)")
    with torch.no_grad():
        x, size = net.norm(tokens.features)[:, 3:], tokens.size[:, 3:, None]
        most, mean = x.amax(1), (x * size).sum(1) / size.sum(1)
        expected = net.head(net.fc_norm(most if pool == "max" else 0.5 * (most + mean)))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def probed(name: str) -> tuple[nn.Module, nn.Module]:
    """A model, and its head with a query of its own."""
    if name == "timm":
        net = timm_head("map")
        return net, net.attn_pool
    net = {"siglip": tiny.tiny_siglip, "siglip2": tiny.tiny_siglip2, "aimv2": tiny_aimv2}[name]()
    return net, net.head


def heads_input(net: nn.Module, head: nn.Module, method: Any) -> tuple[Tensor, Tensor, Tokens]:
    """What the head was handed, what it made of it, and the tokens of the run."""
    calls: list[tuple] = []
    handle = head.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    with torch.no_grad(), apply(net, method) as run:
        net(**tiny.inputs_for(net))
        tokens = run.tokens
    handle.remove()
    return *calls[0], tokens


class Ragged(Dropping):
    """Leaves 5, 9 and 13 patches of three pictures in front of a block."""

    def reduce(self, tokens: Tokens, signals: Any = None) -> Reduction:
        at = torch.arange(len(tokens))
        return Reduction.select(torch.stack([at < tokens.prefix + n for n in (5, 9, 13)]), prefix=tokens.prefix)


@pytest.mark.parametrize("name", ["siglip", "siglip2", "aimv2", pytest.param("timm", marks=timm_is_here)])
def test_a_head_that_asks_all_tokens_meets_merged_ones_as_often_as_they_count(name: str) -> None:
    """As if each token stood there as many times as the patches it was merged from."""
    net, head = probed(name)
    x, made, tokens = heads_input(net, head, get("tome(keep=0.4)"))
    size = tokens.size[:, -x.shape[1] :]
    real = tokens.real[:, -x.shape[1] :]
    assert float(size.max()) > 1
    with torch.no_grad():
        for number in range(3):
            row, times = x[number : number + 1, real[number]], size[number, real[number]].long()
            each = head(row.repeat_interleave(times, 1))
            torch.testing.assert_close(made[number : number + 1], each, atol=1e-5, rtol=1e-5)
            assert (made[number] - head(row)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["siglip", "siglip2", "aimv2", pytest.param("timm", marks=timm_is_here)])
def test_a_head_that_asks_all_tokens_does_not_see_padding(name: str) -> None:
    net, head = probed(name)
    x, made, _ = heads_input(net, head, Ragged())
    with torch.no_grad():
        for number, count in enumerate((5, 9, 13)):
            own = x[number : number + 1, : count + x.shape[1] - 13]
            torch.testing.assert_close(made[number : number + 1], head(own), atol=1e-5, rtol=1e-5)
        assert (made[:1] - head(x[:1])).abs().max() > 1e-4


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


# -- timm --------------------------------------------------------------------------------------------------------------------


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


@timm_is_here
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


@timm_is_here
def test_timm_forward_features_and_the_class_see_the_tokens_that_are_left() -> None:
    net = tiny_encoders.tiny_timm(num_classes=6, global_pool="token")
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad(), apply(net, "fastervlm", keep=9) as run:
        features = net.forward_features(pixels)
        assert features.shape == (2, 3 + 9, 32) and torch.equal(run.tokens.features, features)
        assert net(pixels).shape == (2, 6)


@timm_is_here
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


def test_the_page_for_contributors_shows_an_adapter_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-model.md").read_text()
    assert f"<!-- encoder: begin -->\n```python\n{inspect.getsource(aimv2)}```\n<!-- encoder: end -->" in page
