"""Heads behind an encoder: what averages, takes the maximum or asks all tokens counts merged ones for what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
import tiny_encoders
import with_timm
from dropping import Dropping
from jeton.engine import apply
from jeton.method import get
from jeton.models import adapt
from jeton.tokens import Reduction, Tokens
from tiny_aimv2 import tiny_aimv2

timm_is_here = pytest.mark.skipif(not with_timm.has_timm(), reason="timm or torchvision is not installed")


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
