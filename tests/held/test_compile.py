"""`torch.compile` with methods applied: the same results, and nothing compiled anew from one call to the next."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import jeton
import tiny
from held_same import AT_ALL_SITES, LLAVA, QWEN


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def others(net: nn.Module, inputs: tiny.Inputs, seed: int) -> tiny.Inputs:
    """Inputs of the same shapes: other pictures, other words."""
    generator = torch.Generator().manual_seed(seed)
    pixels = {name: torch.randn(value.shape, generator=generator) for name, value in inputs.items() if name == "pixel_values"}
    if "input_ids" in inputs:
        ids = inputs["input_ids"].clone()
        text = ids >= tiny.WORDS
        ids[text] = torch.randint(tiny.WORDS, tiny.VOCABULARY, (int(text.sum()),), generator=generator)
        pixels["input_ids"] = ids
    return {**inputs, **pixels}


def check(net: nn.Module, spec: str, backend: str = "eager") -> None:
    first = tiny.prompts(net, tiny.one_image(net)) if tiny.is_language(net) else tiny.pictures(net)
    calls = [first, others(net, first, 1), others(net, first, 2)]
    with jeton.apply(net, spec):
        plain = [tiny.run(net, inputs) for inputs in calls]
        compiled = torch.compile(net, backend=backend)
        made, graphs = [], []
        for inputs in calls:
            made.append(tiny.run(compiled, inputs))
            graphs.append(counters["stats"]["unique_graphs"])
    for mine, right in zip(made, plain, strict=True):
        assert mine.shape == right.shape and torch.allclose(mine, right, atol=1e-4)
    assert not torch.allclose(plain[0], plain[1], atol=1e-2)
    # a second call may meet what the first has set up (hooks that collect outputs, caches); from then on all is known
    assert graphs[0] > 0 and graphs[1] == graphs[2]


@pytest.mark.slow
def test_an_encoder_with_methods_in_blocks_and_behind() -> None:
    check(tiny.model("CLIPVisionModel"), "tome(keep=30) | fastervlm(keep=20)")


def test_methods_at_all_sites_of_a_vision_language_model() -> None:
    check(tiny.model(LLAVA), AT_ALL_SITES)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["fastervlm(keep=20)", "tome(keep=20)", "divprune(keep=20)", "fastv(keep=20)"])
def test_each_site_of_llava(spec: str) -> None:
    check(tiny.model(LLAVA), spec, "aot_eager")


@pytest.mark.slow
def test_a_packed_tower_and_positions_of_three_rows() -> None:
    check(tiny.model(QWEN), "divprune(keep=10) | fastv(layer=2, keep=5)")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor() -> None:
    check(tiny.model(LLAVA), AT_ALL_SITES, "inductor")


@torch.no_grad()
def test_what_was_compiled_before_is_not_used_when_methods_come_and_go() -> None:
    """torch.compile does not look at hooks."""
    net = tiny.tiny_clip()
    inputs = tiny.pictures(net)
    compiled = torch.compile(net, backend="eager")
    whole = compiled(**inputs).last_hidden_state
    assert torch.allclose(whole, net(**inputs).last_hidden_state, atol=1e-5)
    with jeton.apply(net, "evit(keep=10)"):
        short = compiled(**inputs).last_hidden_state
        assert torch.allclose(short, net(**inputs).last_hidden_state, atol=1e-5)
    assert short.shape[1] < whole.shape[1]
    assert torch.allclose(compiled(**inputs).last_hidden_state, whole, atol=1e-5)


@torch.no_grad()
def test_the_compiled_model_itself_is_taken() -> None:
    net = tiny.tiny_clip()
    inputs = tiny.pictures(net)
    compiled = torch.compile(net, backend="eager")
    with jeton.apply(compiled, "divprune(keep=9)") as run:
        made = compiled(**inputs).last_hidden_state
        assert made.shape[1] == 10 and run.report().images[0].after == 9
        with pytest.raises(RuntimeError, match="already has"):
            jeton.apply(net, "random")
