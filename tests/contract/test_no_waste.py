"""No method stores a map of all tokens against all unless its card asks for one, and none makes the host wait for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, each, variants, view
from torch._subclasses.fake_tensor import FakeTensorMode
from witness import Shapes, Stand

import tiny
from jeton.engine import apply
from jeton.tokens import Reduction, Tokens

SIDE = 20  # 400 patches: more than any slab, and no other size of these models
# methods that compare every token with every other by their definition; all others must do without
ALL_PAIRS = {
    "pitome": "the energy of a token is a mean over its similarity to all others",
    "catp": "facility location asks of every token how well each other one covers it",
    "divprune": "a table of cosines, no attention: faster than a row per pick; above 4096 tokens rows are computed instead",
}
# methods that learn from the picture how many tokens go at a step, though what is left at last is fixed: a shorter sequence has
# to wait for that number
COUNTED = {
    "flowcut": "the entropy of the class token's attention says how many patches go at each of its blocks",
    "a-vit": "every token says itself when it halts",
}


def wide(case: Case) -> torch.nn.Module:
    if case.model.startswith("Llava"):
        return _llava()
    return _tower("clip" if case.model == "CLIPVisionModel" else "siglip")


_MADE: dict[str, torch.nn.Module] = {}


def _llava() -> torch.nn.Module:
    return _MADE.setdefault("llava", tiny.tiny_llava(side=SIDE))


def _tower(kind: str) -> torch.nn.Module:
    build = tiny.tiny_clip if kind == "clip" else tiny.tiny_siglip
    return _MADE.setdefault(kind, build(image_size=SIDE * tiny.PATCH))


WIDE = [
    case
    for method, fields in variants()
    for case in (Case(method, fields, "CLIPVisionModel"), Case(method, fields, "LlavaForConditionalGeneration"))
]


def _claimed(case: Case) -> bool:
    from cases import claimed

    return claimed(case)


def _inputs(net: torch.nn.Module) -> tiny.Inputs:
    if not tiny.is_language(net):
        return {"pixel_values": torch.randn(2, 3, SIDE * tiny.PATCH, SIDE * tiny.PATCH)}
    return tiny.prompts(net, [tiny.Sample(((),), (4, 5), 1), tiny.Sample(((),), (4, 5), 2)])


@each([case for case in WIDE if _claimed(case)])
def test_no_map_of_all_tokens_against_all_is_stored(case: Case) -> None:
    net = wide(case)
    inputs = _inputs(net)
    with Shapes(SIDE**2) as plain:
        tiny.run(net, inputs)
    with apply(net, case.made(keep=0.5)), Shapes(SIDE**2) as reduced:
        tiny.run(net, inputs)
    # the model's own causal mask is a map of the prompt, longer than the picture; look only at maps of the picture's tokens
    maps = {s: op for s, op in reduced.found.items() if s not in plain.found and all(SIDE**2 <= x <= SIDE**2 + 1 for x in s[-2:])}
    if case.method in ALL_PAIRS:
        assert maps, f"{case.method} no longer needs its exception: {ALL_PAIRS[case.method]}"
    else:
        assert not maps, f"{case.method} stores {maps}"


def test_the_witness_sees_a_map() -> None:
    with Shapes(SIDE**2) as shapes:
        x = torch.randn(1, SIDE**2, 8)
        (x @ x.mT).softmax(-1)
    assert shapes.found


class Unwaiting(Stand):
    """Decides once on real tensors and once on fake ones, which raise at any look at a value (item, tolist, nonzero, if)."""

    def reduce(self, tokens: Tokens, signals=None) -> Reduction:
        made = self.inner.reduce(tokens, signals)
        mode = FakeTensorMode(allow_non_fake_inputs=False)
        heard = {name: _fake(value, mode) for name, value in (signals or {}).items()}
        with mode:
            fake = {
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in vars(tokens).items()
            }
            if tokens.place is not None:
                place = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in vars(tokens.place).items()}
                fake["place"] = type(tokens.place)(**place)
            shadow = self.inner.reduce(Tokens(**fake), heard)
            shadow.apply(Tokens(**fake))
        self.decided.append(made)
        assert shadow.index.shape == made.index.shape
        return made


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    """A tensor or a method's own modules without their values."""
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    value = copy.deepcopy(value)
    for module in value.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, mode.from_tensor(weight))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer))
    return value


@pytest.mark.parametrize("keep", [20, 0.3], ids=str)
@each([case for case in WIDE if _claimed(case)])
def test_nothing_waits_for_the_device_where_the_budget_is_fixed(case: Case, keep: int | float) -> None:
    net = tiny.model(case.model)
    inputs = tiny.inputs_for(net) if not tiny.is_language(net) else tiny.prompts(net, tiny.samples(net)[:2])
    method = Unwaiting(case.made(keep), [])
    if case.method in COUNTED:
        with apply(net, method), pytest.raises(Exception, match=r"_local_scalar_dense|item|tolist|data-dependent"):
            tiny.run(net, inputs)
        return
    with apply(net, method):
        tiny.run(net, inputs)
    assert method.decided
    assert view(case.model) is not None


def test_the_witness_of_waiting_sees_a_wait() -> None:
    with FakeTensorMode() as mode, pytest.raises(Exception, match=r"_local_scalar_dense|item"):
        mode.from_tensor(torch.ones(3)).sum().item()
