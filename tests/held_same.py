"""What every way to hold a model is asked: under the same methods it says what the plain model says."""

from __future__ import annotations

import torch
from torch import nn

import jeton
import tiny

LLAVA, QWEN = "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
AT_ALL_SITES = "tome(keep=40) | fastervlm(keep=30) | divprune(keep=20) | fastv(layer=2, keep=10)"


def same_under(spec: str, net: nn.Module, plain: nn.Module, atol: float) -> None:
    """Logits, what is kept, and what is generated; and nothing is left behind."""
    inputs = tiny.prompts(plain, tiny.one_image(plain))
    made, said, kept = [], [], []
    for model in (plain, net):
        whole = tiny.run(model, inputs)
        with jeton.apply(model, spec) as run:
            made.append(tiny.run(model, inputs))
            kept.append(run.assignment(0)[0])
            said.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
            report = run.report()
        assert report.flops < report.flops_full
        assert torch.equal(tiny.run(model, inputs), whole)
    assert made[0].shape == made[1].shape and torch.allclose(*made, atol=atol)
    assert torch.equal(*kept) and torch.equal(*said)
    assert not torch.allclose(made[0][:, -1], whole[:, -1], atol=1e-2)
