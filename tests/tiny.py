"""Tiny models of the real transformers classes, with random weights, and inputs for them. Nothing is downloaded.

Weights are drawn with a standard deviation of 0.2: with the usual 0.02 a wrong variant differs from the right one by next to
nothing, and a test that compares them says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

PAD, IMAGE, VIDEO, START, END, WORDS, VOCABULARY = 0, 3, 4, 5, 6, 10, 100  # token ids; words begin at WORDS
INSIDE = (7, 8, 9)  # what families write between the tokens of one image
TILE: dict[str, tuple[int, ...]] = {}  # families whose images are several pictures, with an image that is one
BY_ONE: set[str] = set()  # families that repeat the pictures of a prompt for its beams one by one
COORDINATES = {"qwen2"}  # families whose positions are time, height and width, told by the types of tokens
SIDE, PATCH = 7, 4  # an encoder sees SIDE x SIDE patches of PATCH pixels
Inputs = dict[str, Any]


# -- models ------------------------------------------------------------------------------------------------------------


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that matter, evaluation mode, and a generation that does not stop before it is told to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            else:
                weight.copy_((0.02 if name.endswith("bias") else 0.2) * noise)
        if hasattr(model, "lm_head"):
            model.lm_head.weight[:WORDS] = 0  # never the likeliest: an answer with image tokens in it could not be recomputed
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, PAD, 1
    return model.eval()


def vision(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
    return {**sizes, "image_size": SIDE * PATCH, "patch_size": PATCH, **more}


def _text() -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4}
    return {
        **sizes,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tiny_clip(**more: Any) -> nn.Module:
    return ready(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision(**more))))


def tiny_clip_with_projection() -> nn.Module:
    return ready(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision(projection_dim=16))))


def tiny_siglip(**more: Any) -> nn.Module:
    return ready(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision(**more))))


def tiny_siglip2() -> nn.Module:
    config = {name: value for name, value in vision().items() if name != "image_size"}
    return ready(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**config, num_patches=SIDE**2)))


def tiny_vit(**more: Any) -> nn.Module:
    return ready(transformers.ViTModel(transformers.ViTConfig(**vision(**more))))


def tiny_deit() -> nn.Module:
    return ready(transformers.DeiTModel(transformers.DeiTConfig(**vision())))


def tiny_dinov2(**more: Any) -> nn.Module:
    return ready(transformers.Dinov2Model(transformers.Dinov2Config(**vision(mlp_ratio=2, **more))))


def tiny_dinov2_registers() -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**vision(mlp_ratio=2, num_register_tokens=3))
    return ready(transformers.Dinov2WithRegistersModel(config))


def packed_tower(**more: Any) -> dict[str, Any]:
    """A tower that takes pictures in one sequence."""
    sizes = {"depth": 5, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 4}
    return {**sizes, "patch_size": PATCH, **more}


# one builder for each class name an adapter is registered under; several for one class where variants matter
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "CLIPVisionModel": tiny_clip,
    "CLIPVisionModelWithProjection": tiny_clip_with_projection,
    "SiglipVisionModel": tiny_siglip,
    "Siglip2VisionModel": tiny_siglip2,
    "ViTModel": tiny_vit,
    "DeiTModel": tiny_deit,
    "Dinov2Model": tiny_dinov2,
    "Dinov2WithRegistersModel": tiny_dinov2_registers,
}


@cache
def model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model of this name. It is shared between tests: whoever changes it must put it back."""
    made = BUILDERS[name]()
    language = getattr(getattr(made, "model", made), "language_model", made)
    if not hasattr(made, "set_attn_implementation"):
        attend(made, attention)
    elif attention == "sdpa" and getattr(language.config, "attn_logit_softcapping", None):  # sdpa knows no cap
        made.set_attn_implementation({"text_config": "eager", "vision_config": attention})
    else:
        made.set_attn_implementation(attention)
    return made.to(dtype)


def attend(net: nn.Module, attention: str) -> None:
    """timm's models have a switch in each attention, where others have an implementation."""
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention != "eager"


# -- prompts for vision-language models ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One prompt. `images` are sizes in the family's own terms: () for LLaVA, (height, width) in pixels for LLaVA-NeXT and those
    after it, where (frames,) is a video; a grid (time, height, width) of patches for Qwen, where time above 1 is one. `text` are
    the lengths of the runs of text before, between and after them. The same seed gives the same pixels and words, alone or in a
    batch."""

    images: tuple[tuple[int, ...], ...]
    text: tuple[int, ...]
    seed: int


# what the three prompts of a family show
SHAPES: dict[str, list[tuple[tuple[int, ...], ...]]] = {}


def samples(net: nn.Module) -> list[Sample]:
    """Three prompts of different lengths: one image; two of different shapes; one that is small or a video."""
    one, two, three = SHAPES[family(net)]
    return [Sample(one, (4, 9), 1), Sample(two, (2, 3, 5), 2), Sample(three, (1, *(len(three) - 1) * [4], 6), 3)]


def family(net: nn.Module) -> str:
    if getattr(getattr(net.config, "vision_config", net.config), "model_type", "") == "pixtral":
        return "pixtral"
    kind = net.config.model_type.removeprefix("jeton_")
    return "qwen2" if kind.startswith("qwen2") else kind


def one_image(net: nn.Module) -> list[Sample]:
    return samples(net)[:1]


def for_beams(net: nn.Module) -> Inputs:
    """All three prompts where `generate` encodes pictures before it repeats prompts. Older versions repeat the pictures of a
    batch one by one, which mixes up those of prompts with several, in the unmodified model too: only prompts with one there."""
    chosen = samples(net)
    early = hasattr(transformers.GenerationMixin, "_supports_mm_encoder_outputs") and family(net) not in BY_ONE
    if not early and family(net) in TILE:  # tiles, too
        return prompts(net, [Sample((TILE[family(net)],), sample.text[-2:], sample.seed) for sample in chosen[::2]])
    return prompts(net, chosen if early else chosen[::2])


def prompts(net: nn.Module, chosen: Sequence[Sample] | None = None) -> Inputs:
    """Inputs of a batch of prompts, padded on the left; all three of `samples` if not given."""
    chosen = samples(net) if chosen is None else chosen
    singles = [_single(net, sample) for sample in chosen]
    longest = max(single["input_ids"].shape[1] for single in singles)
    batch: Inputs = {}
    for name in dict.fromkeys(name for single in singles for name in single):
        parts = [single[name] for single in singles if name in single]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            parts = [nn.functional.pad(part, (longest - part.shape[1], 0), value=PAD) for part in parts]
        if name.startswith("pixel") and parts[0].dim() >= 4:  # pictures, crops or tiles of different sizes or numbers
            sizes = [max(sides) for sides in zip(*(part.shape[1:] for part in parts), strict=True)]
            parts = [_grown(part, sizes) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


def _grown(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros behind every axis but the first, up to these sizes."""
    more = [(0, size - own) for size, own in zip(sizes, part.shape[1:], strict=True)]
    return nn.functional.pad(part, [side for both in reversed(more) for side in both])


def first_picture(inputs: Inputs) -> tuple[int, int]:
    """The axis of a prompt's pixels along which images follow each other, and how much of it the first image takes."""
    if "pixel_attention_mask" in inputs:
        tiles = int((inputs["input_ids"][0] == IMAGE).long().diff().clamp(min=0).sum())  # text announces each
        return 1, tiles - 1  # the second image is a single one
    return 0, int(inputs["image_grid_thw"][0].prod()) if "image_grid_thw" in inputs else 1


def words(length: int, seed: int) -> Tensor:
    """(1, length) text tokens."""
    return torch.randint(WORDS, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def text_only(net: nn.Module, length: int = 9, batch: int = 2) -> Inputs:
    ids = torch.cat([words(length, seed) for seed in range(batch)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def positions(net: nn.Module, inputs: Inputs) -> Tensor:
    """Position ids as `generate` counts them: from the first real token. (B, L), or (3, B, L) for Qwen."""
    base = getattr(net, "model", net)
    if hasattr(base, "get_rope_index"):
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if name in inputs}
        masks = {name: inputs[name] for name in ("mm_token_type_ids", "attention_mask")}
        return base.get_rope_index(inputs["input_ids"], **masks, **grids)[0]
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + first(net)


def first(net: nn.Module) -> int:
    """The position of the first token."""
    return FIRST.get(family(net), 0)


def extended(inputs: Inputs, new: Tensor) -> Inputs:
    """The same prompts with more text behind."""
    more = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], 1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", _later(inputs))):
        if name in inputs:
            more[name] = nn.functional.pad(inputs[name], (0, new.shape[1]), value=value)
    return more


def _later(inputs: Inputs) -> int:
    """The type of what is said behind a prompt: PaliGemma marks it, where Gemma 3 marks images."""
    types = inputs.get("token_type_ids")
    return int(types is not None and not bool(types[inputs["input_ids"] == IMAGE].any()))


def _single(net: nn.Module, sample: Sample) -> Inputs:
    generator = torch.Generator().manual_seed(100 + sample.seed)
    pixels, counts, marks = PICTURES[family(net)](net, sample.images, generator) if sample.images else ({}, [], [])
    runs = [words(length, 10 * sample.seed + i)[0] for i, length in enumerate(sample.text)]
    if family(net) in COORDINATES:  # generation counts images by these
        for before, after in pairwise(runs):
            before[-1], after[0] = START, END
    parts = [runs[0]]
    for count, mark, run in zip(counts, marks, runs[1:], strict=True):
        parts += [mark if isinstance(mark, Tensor) else torch.full((count,), mark), run]
    ids = torch.cat(parts)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if family(net) in COORDINATES:
        films = 2 if "pixel_values" not in inputs else 1  # some families write videos with image tokens
        inputs["mm_token_type_ids"] = films * (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    if family(net) in TYPES:
        inputs["token_type_ids"] = TYPES[family(net)](ids)
    return inputs


def encoded(base: nn.Module, stream: str, own: Inputs) -> list[Tensor]:
    """(tokens, D) what the unmodified model writes into the prompt for each image or video."""
    encode = getattr(base, f"get_{stream}_features")
    older = stream == "video" and "pixel_values" in signature(encode).parameters
    if older:  # other names, frames kept apart, and the newline of LLaVA-OneVision's videos added behind this method
        own = {name.removesuffix("_videos"): value for name, value in own.items()}
    made = [part.flatten(0, -2) for part in encode(**own).pooler_output]
    newline = older and "onevision" in base.config.model_type
    return [torch.cat([part, base.image_newline[None]]) for part in made] if newline else made


# for each family what makes pixels, the counts of their tokens, and the token they are written with or all that is written
PICTURES: dict[str, Callable[..., tuple[Inputs, list[int], list[Any]]]] = {}
# the first position, where it is not 0
FIRST: dict[str, int] = {}
# for families that are told which tokens see each other, `token_type_ids` of a prompt
TYPES: dict[str, Callable[[Tensor], Tensor]] = {}


# -- pictures for encoders alone -----------------------------------------------------------------------------------------


# inputs of encoders that take something else than square pictures, by model_type, or by class where there is none
ALONE: dict[str, Callable[[nn.Module, int, torch.Generator], Inputs]] = {}


def pictures(net: nn.Module, batch: int = 3, seed: int = 0) -> Inputs:
    """Inputs of an encoder that stands alone. SigLIP2 gets pictures of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    kind = family(net) if hasattr(net, "config") else type(net).__name__
    if kind in ALONE:
        return ALONE[kind](net, batch, generator)
    if net.config.model_type == "siglip2_vision_model":
        shapes = [(7, 7), (4, 9), (6, 5)][:batch]
        mask = torch.zeros(len(shapes), SIDE**2, dtype=torch.long)
        for row, (h, w) in enumerate(shapes):
            mask[row, : h * w] = 1
        patches = torch.randn(len(shapes), SIDE**2, 3 * PATCH**2, generator=generator) * mask[..., None]
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}
    if family(net) in COORDINATES:
        grid = torch.tensor([(1, 8, 12), (1, 6, 6), (2, 6, 8)][:batch])
        return {"hidden_states": torch.randn(int(grid.prod(1).sum()), 6 * PATCH**2, generator=generator), "grid_thw": grid}
    if family(net) == "pixtral":
        return PICTURES["pixtral"](net, [(32, 48), (24, 24), (36, 16)][:batch], generator)[0]
    size = net.config.image_size
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}


def row(inputs: Inputs, at: int) -> Inputs:
    """One picture of a batch for an encoder."""
    return {name: value[at : at + 1] for name, value in inputs.items()}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def is_language(net: nn.Module) -> bool:
    return any(hasattr(getattr(net, "model", net), name) for name in ("language_model", "text_model"))


def inputs_for(net: nn.Module) -> Inputs:
    """The full batch: three prompts, or three pictures. Copy a tensor before you change it."""
    if net not in _INPUTS:
        made = prompts(net) if is_language(net) else pictures(net)
        _INPUTS[net] = cast(made, next(net.parameters()).dtype)
    return dict(_INPUTS[net])


_INPUTS: WeakKeyDictionary[nn.Module, Inputs] = WeakKeyDictionary()


def real(net: nn.Module, inputs: Inputs) -> Tensor:
    """(B, N) true where the model's output (see `run`) is about something; SigLIP2 pads its pictures on the right."""
    if is_language(net):
        return torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if "pixel_attention_mask" in inputs:
        return inputs["pixel_attention_mask"].bool()
    return torch.ones(run(net, inputs).shape[:2], dtype=torch.bool)


@torch.no_grad()
def run(net: nn.Module, inputs: Inputs, **more: Any) -> Tensor:
    """The output that matters: logits, or the last hidden state, a map (B, D, h, w) row by row."""
    found = result(net(**inputs, **more))
    return found.flatten(2).mT if found.dim() == 4 else found


def result(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


# families in files of their own join the tables above
import tiny_aimv2  # noqa: E402, F401
import tiny_aya  # noqa: E402, F401
import tiny_cohere2  # noqa: E402, F401
import tiny_encoders  # noqa: E402, F401
import tiny_gemmas  # noqa: E402, F401
import tiny_glm4v  # noqa: E402, F401
import tiny_idefics3  # noqa: E402, F401
import tiny_internvl  # noqa: E402, F401
import tiny_ovis2  # noqa: E402, F401
import tiny_pixtral  # noqa: E402, F401
import tiny_qwen3_vl  # noqa: E402, F401
import tiny_vit_msn  # noqa: E402, F401
from tiny_llava import tiny_llava, tiny_llava_next, tiny_llava_onevision  # noqa: E402, F401
from tiny_qwen2_vl import tiny_qwen2_5_vl  # noqa: E402, F401
