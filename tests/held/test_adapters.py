"""Training with a method applied, through peft: the loss is that of the shorter prompt, and adapters learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jeton
import tiny

peft = pytest.importorskip("peft")
LLAVA, QWEN = "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
KEEP = 10


def adapted(name: str, task: str | None) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=r".*\.(q_proj|v_proj|qkv)", init_lora_weights=False, task_type=task)
    return peft.get_peft_model(tiny.BUILDERS[name](), config)


def labelled(net: nn.Module) -> tiny.Inputs:
    inputs = tiny.prompts(net, tiny.one_image(net))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < tiny.WORDS, -100)
    return {**inputs, "labels": labels}


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the words that follow, in a prompt whose picture has lost all but the last KEEP of its columns."""
    visual = (labels[0] == -100).nonzero().flatten()
    columns = torch.ones_like(labels[0], dtype=torch.bool).index_fill(0, visual[: labels.shape[1] - logits.shape[1]], False)
    left = labels[:, columns]
    assert left.shape[1] == logits.shape[1]
    return F.cross_entropy(logits[0, :-1].float(), left[0, 1:], ignore_index=-100)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(
    ("name", "spec"),
    [(LLAVA, f"tome(keep=40) | fastervlm(keep=30) | divprune(keep={KEEP})"), (QWEN, f"divprune(keep={KEEP})")],
)
def test_the_wrapped_model_is_found_and_its_loss_is_that_of_the_shorter_prompt(name: str, spec: str, task: str | None) -> None:
    wrapped = adapted(name, task).train()
    inputs = labelled(wrapped.get_base_model())
    with torch.no_grad():
        whole = wrapped(**inputs).loss
    with jeton.apply(wrapped, spec) as run:
        output = wrapped(**inputs)
        assert run.report().images[0].after == KEEP
        output.loss.backward()
        with pytest.raises(RuntimeError, match="already has"):
            jeton.apply(wrapped.get_base_model(), "random")
    assert output.logits.shape[1] < inputs["input_ids"].shape[1]
    assert torch.allclose(output.loss, by_hand(output.logits, inputs["labels"]), atol=1e-6)
    assert not torch.allclose(output.loss, whole, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(wrapped(**inputs).loss, whole)
    seen = ("language_model", "visual" if name == QWEN else "vision_tower")
    learners = {at: weight.grad for at, weight in wrapped.named_parameters() if "lora_" in at}
    for part in seen:  # LLaVA hands the features of the last block but one on
        moved = {at: grad for at, grad in learners.items() if part in at and not (part == "vision_tower" and "layers.4" in at)}
        assert moved and all(grad is not None and float(grad.abs().max()) > 0 for grad in moved.values()), part
    assert all(weight.grad is None for at, weight in wrapped.named_parameters() if "lora_" not in at)


def test_methods_inside_the_language_model_train_too_and_merged_adapters_say_the_same() -> None:
    wrapped = adapted(LLAVA, None).train()
    inputs = labelled(wrapped.get_base_model())
    optimiser = torch.optim.SGD([weight for weight in wrapped.parameters() if weight.requires_grad], lr=1e-3)
    losses = []
    with jeton.apply(wrapped, f"divprune(keep=30) | fastv(layer=2, keep={KEEP})"):
        for _ in range(4):
            loss = wrapped(**inputs).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        wrapped.eval()
        learnt = tiny.run(wrapped, inputs)
    assert losses[-1] < losses[0]
    merged = wrapped.merge_and_unload()
    with jeton.apply(merged, f"divprune(keep=30) | fastv(layer=2, keep={KEEP})"):
        assert torch.allclose(tiny.run(merged, inputs), learnt, atol=1e-3)


def test_sliced_weights_are_refused_under_an_adapter() -> None:
    config = peft.LoraConfig(r=2, target_modules=["gate_proj"])
    wrapped = peft.get_peft_model(tiny.tiny_llava(), config)
    with pytest.raises(jeton.Unsupported, match="merge the adapter"):
        jeton.apply(wrapped, "corematching")
