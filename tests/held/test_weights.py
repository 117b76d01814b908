"""Weights that are not plain numbers on one device: quantized ones, and those accelerate brings in when they are needed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import jeton
import tiny
from held_same import AT_ALL_SITES, LLAVA, QWEN, same_under


def dequantized(net: nn.Module) -> nn.Module:
    """The same model with the numbers its quantized weights stand for."""
    plain = copy.deepcopy(net)
    for part in plain.modules():
        if isinstance(part, nn.Linear) and hasattr(part.weight, "dequantize") and type(part.weight) is not nn.Parameter:
            part.weight = nn.Parameter(part.weight.dequantize(), requires_grad=False)
    return plain


@pytest.mark.parametrize(("name", "spec"), [(LLAVA, AT_ALL_SITES), (QWEN, "divprune(keep=10) | fastv(layer=2, keep=5)")])
def test_int8_weights_of_torchao(name: str, spec: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    net = tiny.BUILDERS[name]()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    plain = dequantized(net)
    layers = [part for part in net.modules() if isinstance(part, nn.Linear) and type(part.weight) is not nn.Parameter]
    assert len(layers) > 20
    same_under(spec, net, plain, atol=1e-3)
    with pytest.raises(jeton.Unsupported, match="quantized"):
        jeton.apply(net, "corematching")


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_bitsandbytes(bits: int, tmp_path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    sizes = tiny.tiny_llava().config  # its 4-bit blocks are 64 numbers of a row
    sizes.vision_config.hidden_size, sizes.vision_config.intermediate_size = 64, 128
    sizes.text_config.intermediate_size = 128
    net = tiny.ready(LlavaForConditionalGeneration(sizes))
    net.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantized = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    assert sum(isinstance(part, kind) for part in quantized.modules()) > 20
    inputs = tiny.prompts(net, tiny.one_image(net))
    with jeton.apply(quantized, AT_ALL_SITES) as run:
        made = tiny.run(quantized, inputs)
        assert run.report().images[0].after == 10 and made.isfinite().all() and made.shape[1] < inputs["input_ids"].shape[1]
        said = quantized.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(("name", "spec"), [(LLAVA, AT_ALL_SITES), (QWEN, "divprune(keep=10) | fastv(layer=2, keep=5)")])
def test_weights_that_accelerate_brings_in_when_they_are_needed(name: str, spec: str, where: str, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    net, plain = tiny.BUILDERS[name](), tiny.BUILDERS[name]()
    if where == "cpu":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(net, tmp_path, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in net.parameters())
    same_under(spec, net, plain, atol=1e-5)


def test_a_device_map_with_parts_on_disk(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    net, plain = tiny.tiny_llava(), tiny.tiny_llava()
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    parts |= {"model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu"}
    parts |= {"model.language_model.rotary_emb": "cpu"}
    parts |= {f"model.language_model.layers.{at}": "disk" if at > 1 else "cpu" for at in range(4)}
    net = accelerate.dispatch_model(net, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert sum(weight.is_meta for weight in net.parameters()) > 10
    before = {name: vars(part).get("_old_forward") for name, part in net.named_modules()}
    same_under(AT_ALL_SITES, net, plain, atol=1e-5)
    assert before == {name: vars(part).get("_old_forward") for name, part in net.named_modules()}
    with pytest.raises(jeton.Unsupported, match="offloaded"):
        jeton.apply(net, "corematching")


@torch.no_grad()
def test_what_parallel_training_wraps_is_found() -> None:
    net = tiny.tiny_clip()
    inputs = tiny.pictures(net)
    wrapped = nn.DataParallel(net)
    with jeton.apply(wrapped, "divprune(keep=9)") as run:
        assert wrapped(**inputs).last_hidden_state.shape[1] == 10 and run.report().images[0].after == 9
        with pytest.raises(RuntimeError, match="already has"):
            jeton.apply(net, "random")
