"""PaliGemma and Gemma 3: which patches make a token, what their processors write, four norms, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import AYA, GEMMA3, PALIGEMMA, PALIGEMMA2
from PIL import Image
from references import CLOSE, difference, generated, recomputed, view_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AyaVisionProcessor, Gemma3Processor, PaliGemmaProcessor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from witness import Listening, spied

import jeton
import tiny
import tiny_aya
import tiny_gemmas
from jeton.engine import apply
from jeton.engine.encoder import EncoderSite
from jeton.method import get
from jeton.models import adapt
from jeton.needs import ReceivedAttention


def wide_gemma3() -> nn.Module:
    """16 x 16 patches averaged in squares of 4 x 4, as the published ones."""
    net = tiny_gemmas.tiny_gemma3(side=16, tokens=16)
    assert net.model.multi_modal_projector.kernel_size == 4
    return net


STEPS = {PALIGEMMA: 1, GEMMA3: 4, AYA: 2}


@torch.no_grad()
@pytest.mark.parametrize("name", list(STEPS))
def test_a_score_on_a_patch_reaches_the_token_that_the_projector_makes_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, step = wide_gemma3() if name == GEMMA3 else tiny.model(name), STEPS[name]
    view = adapt(net)
    inputs = tiny.prompts(net, tiny.samples(net)[:1])
    geometry = view.geometry(inputs, "image")
    side, pictures = int(geometry[0].patches ** 0.5), len(geometry)
    features = torch.randn(pictures, side**2, 32)
    projected = view.base.multi_modal_projector(features).reshape(pictures, -1, 64)
    for picture, row, col in ((0, 0, 0), (0, 2, 5), (pictures - 1, side - 1, side - 2)):
        patch = row * side + col
        changed = features.clone()
        changed[picture, patch] += torch.randn(32)
        after = view.base.multi_modal_projector(changed).reshape(pictures, -1, 64)
        moved = (after - projected).abs().amax(2) > 1e-4
        planted = torch.zeros(pictures * side**2)
        planted[picture * side**2 + patch] = 1
        listener = Listening("entry", {"received": ReceivedAttention()})
        with monkeypatch.context() as patched, apply(net, listener):
            patched.setattr(EncoderSite, "flat", lambda site, need, planted=planted: planted)
            tiny.run(net, inputs)
        heard = listener.heard["received"]
        token = row // step * (side // step) + col // step
        assert moved.nonzero().tolist() == [[picture, token]]
        assert torch.equal(heard, moved.reshape(heard.shape) / step**2)  # tiles of one image are one row


@torch.no_grad()
@pytest.mark.parametrize("name", [PALIGEMMA, PALIGEMMA2, GEMMA3])
def test_parts_put_together_are_the_layer(name: str) -> None:
    net = tiny.model(name, "eager")
    view = view_of(net)
    x = torch.randn(2, 9, 64)
    for layer in view.layers:
        ids = torch.arange(9)[None]
        kind = (layer.self_attn.layer_type,) if name == GEMMA3 else ()
        given = {"position_embeddings": view.rotary(x, ids, *kind), "attention_mask": None}
        parts = view.parts(layer)
        mine = x + parts.scale1(parts.attention(hidden_states=parts.norm1(x), **given)[0])
        mine = mine + parts.scale2(parts.mlp(parts.norm2(mine)))
        assert torch.allclose(mine, layer(x, **given), atol=1e-5)
        if name != PALIGEMMA:  # the norms behind the halves matter
            assert not torch.allclose(parts.scale2(x), x, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", [PALIGEMMA2, GEMMA3])
def test_a_layer_with_four_norms_leaves_out_its_mlp(name: str) -> None:
    """What is left of it is the attention with a norm in front and one behind."""
    net = tiny.model(name)
    inputs = {**tiny.inputs_for(net), "position_ids": tiny.positions(net, tiny.inputs_for(net))}
    layer = view_of(net).layers[2]

    def attention_alone(x: torch.Tensor, **given: object) -> torch.Tensor:
        return x + layer.post_attention_layernorm(layer.self_attn(hidden_states=layer.input_layernorm(x), **given)[0])

    layer.forward = attention_alone
    try:
        right = tiny.run(net, inputs, use_cache=False)
    finally:
        del layer.forward
    with apply(net, "ima(skip='ffn', scope='context', start=1, end=3)"):
        assert difference(tiny.run(net, inputs, use_cache=False), right) < CLOSE
    assert difference(tiny.run(net, inputs, use_cache=False), right) > 100 * CLOSE


def test_halves_beside_each_other_cannot_be_told_apart() -> None:
    with pytest.raises(jeton.Unsupported, match=r"Cohere2DecoderLayer.*fastv"):
        apply(tiny.model(AYA), "ima").remove()


def test_paligemma_must_be_told_which_tokens_see_each_other() -> None:
    net = tiny.model(PALIGEMMA)
    inputs = tiny.inputs_for(net)
    del inputs["token_type_ids"]
    with apply(net, "random", keep=0.3), pytest.raises(ValueError, match=r"token_type_ids.*processor"):
        tiny.run(net, inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", [GEMMA3, PALIGEMMA])
def test_images_stay_apart_when_what_stood_between_them_is_short(name: str) -> None:
    """Gemma 3: tokens of the second image are not seen from the first one. PaliGemma: they are."""
    net = tiny.model(name)
    inputs = tiny.prompts(net, [tiny.Sample(((), ()), (2, 1, 3), 4)])
    inputs["position_ids"] = tiny.positions(net, inputs)
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][1] += 1
    made = []
    for given in (inputs, other):
        with apply(net, "uniform(keep=0.2)") as run:
            made.append(tiny.run(net, given))
            first = run.report().images[0].after
    before = slice(2, 2 + first)
    assert torch.equal(made[0][:, before], made[1][:, before]) == (name == GEMMA3)
    assert not torch.equal(made[0][:, -1], made[1][:, -1])


# -- processors ------------------------------------------------------------------------------------------------------------


def tokenizer(special: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    known = {"<pad>": tiny.PAD, "<bos>": 1, "<eos>": 2, **special, "what": 20, "is": 21, "TILE_1": 30, "TILE_2": 31}
    made = Tokenizer(models.WordLevel(known, unk_token="what"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"extra_special_tokens": named} if named else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left", **extra
    )
    fast.add_special_tokens({"additional_special_tokens": [word for word in special if word not in named.values()]})
    return fast


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(1, 255, (height, width, 3), np.uint8))


PICTURES = [[picture(40, 80)], [picture(90, 30), picture(70, 70)]]


def paligemma() -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = tiny.SIDE**2
    return PaliGemmaProcessor(images, tokenizer({"<image>": tiny.IMAGE}))


def gemma3() -> Gemma3Processor:
    names = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    words = tokenizer({"<img>": tiny.IMAGE, "<boi>": tiny.START, "<eoi>": tiny.END}, **names)
    return Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 48, "width": 48}), words, image_seq_length=36)


def aya() -> AyaVisionProcessor:
    start, end, _, whole = tiny_aya.MARKS
    special = {"<|IMG_PATCH|>": tiny.IMAGE, "<|START_OF_IMG|>": start, "<|END_OF_IMG|>": end, "TILE_GLOBAL": whole}
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=4)
    return AyaVisionProcessor(images, tokenizer(special), patch_size=tiny.PATCH, img_size=tiny_aya.TILE, downsample_factor=2)


def written(name: str) -> tuple[tiny.Inputs, list[tuple[int, int]]]:
    """What a family's processor makes of two prompts, and for each image its prompt and its tokens."""
    if name == PALIGEMMA:
        text = ["<image> what", "<image> <image> is what"]
        text = [part.replace("> <image>", "><image>") for part in text]
        made, images = paligemma()(images=PICTURES, text=text, padding=True, return_tensors="pt"), [(0, 49), (1, 49), (1, 49)]
    elif name == GEMMA3:
        text = ["<boi> what", "<boi> is <boi> what"]
        made, images = gemma3()(images=PICTURES, text=text, padding=True, return_tensors="pt"), [(0, 36), (1, 36), (1, 36)]
    else:
        text = ["<image> what", "<image> is <image> what"]
        made = aya()(images=[*PICTURES[0], *PICTURES[1]], text=text, padding=True, return_tensors="pt")
        images = [(0, 3 * 16), (1, 4 * 16), (1, 5 * 16)]  # tiles and a thumbnail each
    return {key: value for key, value in made.items() if key != "labels"}, images


@pytest.mark.parametrize("name", [PALIGEMMA, GEMMA3, AYA])
def test_what_the_processor_writes_is_read_and_decoded_as_recomputed(name: str) -> None:
    net = tiny.model(name)
    inputs, images = written(name)
    spy, decided = spied(get("divprune", keep=0.5))
    with apply(net, spy) as run:
        output = generated(net, inputs, max_new_tokens=5)
        report = run.report()
    assert [(image.sample, image.before) for image in report.images] == images
    new = output.sequences[:, -5:]
    reference = recomputed(net, inputs, get("divprune", keep=0.5), decided, new)
    assert difference(torch.stack(output.logits, 1), reference) < CLOSE and torch.equal(reference.argmax(-1), new)


def test_paligemma_is_trained_on_the_suffix_its_processor_marks() -> None:
    """The loss over a shortened prompt is that of the labels at the same words."""
    net = tiny.model(PALIGEMMA)
    inputs = paligemma()(images=[PICTURES[0]], text=["<image> what"], suffix=["is what is"], padding=True, return_tensors="pt")
    inputs = dict(inputs)
    assert int((inputs["labels"] >= 0).sum()) == int(inputs["token_type_ids"].sum()) > 2
    labels = inputs.pop("labels")
    with apply(net, "uniform", keep=0.3), torch.no_grad():
        made = net(**inputs, labels=labels)
        logits = net(**inputs).logits
    said = labels[labels >= 0]
    own = nn.functional.cross_entropy(logits[0, -len(said) - 1 : -1], said)
    assert torch.allclose(made.loss, own, rtol=1e-5)
