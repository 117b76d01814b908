"""Methods that are trained: refused without weights, trained by masking what they will remove, saved and read again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import jeton
import tiny
import trained
from jeton.engine import apply
from jeton.learned import Learned
from jeton.method import Promise, get
from jeton.registry import Card
from jeton.tokens import Reduction

ALL = (
    "CLIPVisionModel",
    "SiglipVisionModel",
    "Siglip2VisionModel",
    "DeiTModel",
    "Dinov2WithRegistersModel",
    "BeitModel",
    "DINOv3ViTModel",
    "VideoMAEModel",
    "VisionTransformer",
)
ENCODERS = [name for name in ALL if name in tiny.BUILDERS]  # timm's may be missing


@dataclass(frozen=True)
class Given(Learned):
    """At blocks 1 and 3 the patches whose number leaves a given rest go."""

    card = Card("given", "", 2026, "", "vit", "block", False, "", None)
    site = "block"
    point: str = "before"
    rests: tuple[int, int] = (0, 1)
    at: int = field(default=0, repr=False)

    def chosen(self, tokens):
        stays = (tokens.origin - tokens.prefix) % 5 != self.rests[self.at]
        stays[:, : tokens.prefix] = True
        return stays & tokens.real

    def reduce(self, tokens, signals=None):
        return Reduction.select(self.chosen(tokens), prefix=tokens.prefix)

    def soften(self, tokens, signals):
        return replace(tokens, policy=tokens.seen * self.chosen(tokens))

    def steps(self, n, depth):
        return [replace(self, at=block // 2) if block in (1, 3) else None for block in range(depth)]

    def promise(self, n, depth=12):
        return Promise(n, exact=False)


@pytest.mark.parametrize("point", ["before", "middle", "after"])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_masking_in_training_equals_removing(name: str, point: str):
    net = tiny.model(name)
    inputs = tiny.inputs_for(net)
    with apply(net, Given(point=point)) as run:
        tiny.run(net, inputs)
        left = run.tokens
    softs = []
    for rests in ((0, 1), (0, 2)):  # the second is the twin: one of the steps masks others
        with apply(net, Given(point=point, rests=rests), train=True) as run:
            softs.append(tiny.run(net, inputs))
            policy = run.softened[-1].policy
    assert policy is not None and len(run.softened) == 2
    for row in range(len(left.features)):
        real = left.real[row]
        kept = left.origin[row][real]
        soft, twin = (x[row][kept] for x in softs)
        assert (soft - left.features[row][real]).abs().max() < 1e-3 * soft.abs().max()
        assert (twin - left.features[row][real]).abs().max() > 1e-2 * soft.abs().max()


def test_gradients_reach_what_decides_and_the_encoder_and_nothing_remains():
    net = tiny.tiny_vit()
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "dynamicvit", train=True) as run:
        student = run.student().train()
        loss = student(**inputs).last_hidden_state.square().mean() + sum(run.losses().values())
        loss.backward()
        names = [name for name, weight in student.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0]
    assert any(name.startswith("learned.dynamicvit.0") for name in names) and any(name.startswith("model.") for name in names)
    assert torch.equal(tiny.run(net.eval(), inputs), before)


def test_what_was_learned_is_written_and_read_again(tmp_path: Path):
    net = tiny.model("ViTModel")
    inputs = tiny.inputs_for(net)
    outputs = []
    with apply(net, "dynamicvit", train=True, weights=trained.weights("dynamicvit")) as run:
        assert [place.name for place in run.save(tmp_path)] == ["dynamicvit.safetensors"]
    for weights in (tmp_path, str(tmp_path / "dynamicvit.safetensors"), trained.weights("dynamicvit")):
        method = get("dynamicvit", weights=weights)
        assert get(method.spec) == method
        with apply(net, method):
            outputs.append(tiny.run(net, inputs))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    with apply(net, "dynamicvit", train=True) as run:
        run.save(tmp_path / "other")
    with apply(net, "dynamicvit", weights=tmp_path / "other"):
        assert not torch.equal(tiny.run(net, inputs), outputs[0])


def test_modules_are_single_precision_and_frozen_at_inference():
    net, source = tiny.model("ViTModel", dtype=torch.bfloat16), trained.weights("dynamicvit")
    state = torch.get_rng_state()
    with apply(net, "dynamicvit", weights=source) as run:
        weights = list(run.learned.parameters())
    assert torch.equal(torch.get_rng_state(), state)  # modules that are read draw nothing
    assert weights and all(weight.dtype == torch.float32 and not weight.requires_grad for weight in weights)


def test_the_report_counts_what_deciding_costs():
    net = tiny.model("ViTModel")
    with apply(net, "dynamicvit", keep=48, weights=trained.weights("dynamicvit")) as run:
        tiny.run(net, tiny.inputs_for(net))
        ran = run.report().flops
        own = run.learned.flops(49)
    with apply(net, "evit", keep=48, fuse=False) as run:
        tiny.run(net, tiny.inputs_for(net))
        assert own > 0 and ran > run.report().flops


def refusal(tmp_path: Path, what: str) -> tuple[str, dict]:
    other = tmp_path / "x.safetensors"
    if what == "none":
        return "pass weights=", {}
    if what == "missing":
        return "there is no file", {"weights": str(tmp_path)}
    if what == "no weights":
        other.write_text("words")
        return "no file of weights", {"weights": other}
    if what == "another width":
        with safe_open(trained.weights("dynamicvit"), "pt") as file:
            told, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        first = next(iter(state))
        save_file({**state, first: state[first].repeat(2, *(1,) * (state[first].dim() - 1))}, other, told)
        return rf"first difference: {first}", {"weights": other}
    save_file({"a": torch.zeros(1)}, other, {"method": "another"} if what == "another" else {})
    return {"another": "weights of another, not of dynamicvit", "untold": "something else"}[what], {"weights": other}


@pytest.mark.parametrize("what", ["none", "missing", "no weights", "another", "untold", "another width"])
def test_without_its_weights_a_method_is_refused(tmp_path: Path, what: str):
    words, fields = refusal(tmp_path, what)
    with pytest.raises(ValueError, match=words):
        apply(tiny.model("ViTModel"), "dynamicvit", **fields)


def test_weights_for_another_encoder_are_refused():
    net = tiny.ready(tiny.transformers.ViTModel(tiny.transformers.ViTConfig(**tiny.vision(hidden_size=16))))
    with pytest.raises(ValueError, match="do not fit dynamicvit"):
        apply(net, "dynamicvit", weights=trained.weights("dynamicvit"))
    with pytest.raises(TypeError, match="path"):
        get("dynamicvit", weights=3)


def test_training_takes_one_method_that_learns_on_an_encoder():
    net = tiny.model("ViTModel")
    for spec in ("tome", "dynamicvit | tome"):
        with pytest.raises(ValueError, match="one method that learns"):
            apply(net, spec, train=True)
    with pytest.raises(jeton.Unsupported, match="dynamicvit"):
        apply(tiny.model("LlavaForConditionalGeneration"), "dynamicvit", train=True)


def test_padding_is_seen_by_nobody_in_training():
    net = tiny.model("Siglip2VisionModel")
    inputs = tiny.inputs_for(net)
    with apply(net, Given(), train=True) as run:
        net(**inputs)
        policy: Tensor = run.softened[0].policy
    assert (policy[~inputs["pixel_attention_mask"].bool()] == 0).all() and (policy.sum(1) > 0).all()
