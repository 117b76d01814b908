"""Ways to decode that `generate` has: they say what greedy says, or are refused before the language model runs."""

from __future__ import annotations

import pytest
import torch

import jeton
import tiny
from held_same import LLAVA, QWEN

SPECS = ["divprune(keep=10)", "tome(keep=30) | fastv(layer=2, keep=10)"]


def generated(net, inputs, **how):
    return net.generate(**inputs, max_new_tokens=8, do_sample=False, **how)


@pytest.mark.parametrize("spec", SPECS)
def test_an_assistant_that_sees_everything_drafts_for_the_reduced_model(spec: str) -> None:
    net, assistant = tiny.model(LLAVA), tiny.tiny_llava()
    inputs = tiny.prompts(net, tiny.one_image(net))
    if not torch.equal(generated(net, inputs, assistant_model=assistant), generated(net, inputs)):
        pytest.skip("this version of transformers does not draft for models with pictures")
    with jeton.apply(net, spec):
        greedy = generated(net, inputs)
        assert torch.equal(generated(net, inputs, assistant_model=assistant), greedy)
        with jeton.apply(assistant, spec):
            assert torch.equal(generated(net, inputs, assistant_model=assistant), greedy)
    assert not torch.equal(generated(net, inputs), greedy)


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_prompt_lookup(name: str) -> None:
    net = tiny.model(name)
    inputs = tiny.prompts(net, tiny.one_image(net))
    with jeton.apply(net, "divprune(keep=10) | fastv(layer=2, keep=5)"):
        assert torch.equal(generated(net, inputs, prompt_lookup_num_tokens=3), generated(net, inputs))


@pytest.mark.parametrize("name", [LLAVA, QWEN])
@pytest.mark.parametrize("kind", ["static", "offloaded_static"])
def test_a_static_cache_is_refused_before_the_language_model_runs(name: str, kind: str) -> None:
    net = tiny.model(name)
    inputs = tiny.prompts(net, tiny.one_image(net))
    ran = []
    handle = net.model.language_model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with jeton.apply(net, "divprune(keep=10)"), pytest.raises(ValueError, match=r"static cache.*default dynamic cache"):
        generated(net, inputs, cache_implementation=kind)
    handle.remove()
    assert not ran


@pytest.mark.parametrize("kind", ["dynamic", "offloaded", "quantized"])
def test_caches_that_grow(kind: str) -> None:
    if kind == "quantized":
        pytest.importorskip("optimum.quanto")
    if kind == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloads from a device")
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.one_image(net))
    with jeton.apply(net, "divprune(keep=10)"):
        assert torch.equal(generated(net, inputs, cache_implementation=kind), generated(net, inputs))
