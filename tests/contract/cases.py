"""Every registered method x every registered adapter. A new method or adapter gets the whole contract by being registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from torch import nn

import tiny
import trained
from jeton.method import Method, get, reducers
from jeton.models import Encoder, VisionLanguage, adapt
from jeton.needs import ClassAttention, ClassLikeness, LastAttention

# fields with which decoding runs as recomputation without a cache does; their own decoding has tests of its own in tests/reduce
AS_RECOMPUTED: dict[str, dict[str, Any]] = {"mustdrop": {"shrink": False}, "corematching": {"neurons": 1.0}}
SHARE = 0.3  # the budget where nothing else is said
ATTENTIONS = ("sdpa", "eager")
LLAVA = "LlavaForConditionalGeneration"
LLAVA_SIGLIP = "LlavaForConditionalGeneration-siglip"
LLAVA_NEXT = "LlavaNextForConditionalGeneration"
NEXT_VIDEO = "LlavaNextVideoForConditionalGeneration"
ONEVISION = "LlavaOnevisionForConditionalGeneration"
QWEN2 = "Qwen2VLForConditionalGeneration"
QWEN = "Qwen2_5_VLForConditionalGeneration"
BRIDGED = "BridgedLlava"
INTERNVL = "InternVLForConditionalGeneration"
QWEN3 = "Qwen3VLForConditionalGeneration"
GLM4V = "Glm4vForConditionalGeneration"
OVIS2 = "Ovis2ForConditionalGeneration"
PALIGEMMA = "PaliGemmaForConditionalGeneration"
PALIGEMMA2 = "PaliGemmaForConditionalGeneration-2"
GEMMA3 = "Gemma3ForConditionalGeneration"
AYA = "AyaVisionForConditionalGeneration"
BRIDGED_NEXT = "BridgedLlavaNext"
MISTRAL3 = "Mistral3ForConditionalGeneration"
LLAVA_PIXTRAL = "LlavaForConditionalGeneration-pixtral"
IDEFICS3 = "Idefics3ForConditionalGeneration"
SMOLVLM = "SmolVLMForConditionalGeneration"
COHERE2 = "Cohere2VisionForConditionalGeneration"
# classes whose adapter is that of another class: the model without its head
INNER = (
    "CLIPVisionModelWithProjection",
    "VisionTransformerDistilled",
    *(name for name in tiny.BUILDERS if name.endswith("Model") and tiny.is_language(tiny.model(name))),
)
LANGUAGE = [name for name in tiny.BUILDERS if name not in INNER and tiny.is_language(tiny.model(name))]
AT_ONCE = (PALIGEMMA, PALIGEMMA2)  # all of a prompt sees all of it, so that a second turn is not the rest of a longer first one
BESIDE = (AYA, COHERE2)  # decoder layers whose attention and MLP run beside each other
LITTLE_SAVED = (NEXT_VIDEO, AYA, COHERE2, MISTRAL3)  # some methods save but 2 to 5 % of what these small batches cost
IDS_ONLY = (PALIGEMMA, PALIGEMMA2, GEMMA3)  # `generate` takes no embeddings

# Families that jeton meets in the same way as another. By default they run what looks at the model (every test over `LANGUAGE`)
# and, of the tests over all methods, those over `SPEAKERS`, one for each way to act; the rest is marked slow.
SISTERS = {
    NEXT_VIDEO: ONEVISION,
    QWEN2: QWEN,
    BRIDGED: ONEVISION,
    BRIDGED_NEXT: ONEVISION,
    INTERNVL: ONEVISION,
    QWEN3: QWEN,
    GLM4V: QWEN,
    OVIS2: ONEVISION,
    "InternVLVisionModel": "Dinov2Model",
    "InternVLModel": "LlavaOnevisionModel",
    "Qwen3VLModel": "Qwen2_5_VLModel",
    "Glm4vModel": "Qwen2_5_VLModel",
    "Ovis2Model": "LlavaOnevisionModel",
    PALIGEMMA: LLAVA_SIGLIP,
    PALIGEMMA2: LLAVA_SIGLIP,
    GEMMA3: QWEN,
    AYA: QWEN,
    "PaliGemmaModel": "LlavaModel",
    "Gemma3Model": "Qwen2_5_VLModel",
    "AyaVisionModel": "Qwen2_5_VLModel",
    COHERE2: AYA,
    "Cohere2VisionModel": "AyaVisionModel",
    MISTRAL3: QWEN,
    LLAVA_PIXTRAL: LLAVA_SIGLIP,
    IDEFICS3: ONEVISION,
    SMOLVLM: ONEVISION,
    "SmolVLMVisionTransformer": "SiglipVisionModel",
    "Idefics3VisionTransformer": "SiglipVisionModel",
    "Mistral3Model": "Qwen2_5_VLModel",
    "Idefics3Model": "LlavaOnevisionModel",
    "SmolVLMModel": "LlavaOnevisionModel",
    "LlavaNextVideoModel": "LlavaOnevisionModel",
    "BridgedLlavaModel": "LlavaOnevisionModel",
    "BridgedLlavaNextModel": "LlavaOnevisionModel",
    "Qwen2VLModel": "Qwen2_5_VLModel",
    "DINOv3ViTModel": "Dinov2WithRegistersModel",
    "Aimv2VisionModel": "SiglipVisionModel",
    "ViTMAEModel": "ViTModel",
    "ViTMSNModel": "ViTModel",
    "BeitModel": "ViTModel",
    "IJepaModel": "SiglipVisionModel",
    "VideoMAEModel": "SiglipVisionModel",
    "VisionTransformer": "Dinov2WithRegistersModel",
    "VisionTransformerDistilled": "DeiTModel",
}
SPEAKERS = ("pixelworld", "tome", "fastervlm", "visionzip", "divprune", "fastv")
# families of which only the language model is new: what acts at its door and in it speaks for the rest
LANGUAGE_ONLY = (PALIGEMMA2, AYA)


@dataclass(frozen=True)
class Case:
    """One method, with the fields of a variant, on one tiny model."""

    method: str
    fields: tuple[tuple[str, Any], ...]
    model: str

    def __str__(self) -> str:
        return "-".join([self.method, *(str(value) for _, value in self.fields), self.model])

    def made(self, keep: int | float = SHARE) -> Method:
        return budgeted(self.method, keep, **dict(self.fields))

    def net(self, attention: str = "sdpa", **more: Any) -> nn.Module:
        return tiny.model(self.model, attention, **more)


# what a method cannot be applied without, where it is not the tiny models' to give
GIVEN: dict[str, dict[str, Any]] = {
    "recoverable-compression": {"text": False},
    **{name: {"weights": trained.weights(name)} for name in trained.LEARNED},
}

# methods that find out from every picture how much of it to compute and take no budget: fields with which all of it is, and less
ADAPTIVE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"a-vit": ({"beta": 1e6}, {"beta": 2.0})}


def made(name: str, **fields: Any) -> Method:
    """A method that can be applied to a tiny model."""
    return get(name, **{**GIVEN.get(name, {}), **fields})


def as_recomputed(case: Case) -> Case:
    """The case with its decoding as recomputation without a cache has it."""
    more = AS_RECOMPUTED.get(case.method, {})
    return Case(case.method, (*case.fields, *more.items()), case.model)


def budgeted(name: str, keep: int | float, **fields: Any) -> Method:
    """A method with a budget. The contract speaks of budgets, so every method must take `keep`."""
    cls = get(name).__class__
    names = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if name in ADAPTIVE:
        everything, less = ADAPTIVE[name]
        return made(name, **(everything if keep == 1.0 else less), **fields)
    assert "keep" in names, (
        f"{name} has no field `keep`; the contract cannot set its budget. Add the field, or teach tests/contract/cases.py."
    )
    return made(name, keep=keep, **fields)


def variants() -> Iterable[tuple[str, tuple[tuple[str, Any], ...]]]:
    """Every method as it is, with the score that needs no class token where it has one, and without virtual unmerging."""
    for card in reducers():
        yield card.id, ()
        if any(item.name == "score" for item in dataclasses.fields(card.object)):  # type: ignore[arg-type]
            yield card.id, (("score", "received"),)
        if any(item.name == "unmerge" for item in dataclasses.fields(card.object)):  # type: ignore[arg-type]
            yield card.id, (("unmerge", False),)


@cache
def view(model: str) -> Encoder | VisionLanguage:
    return adapt(tiny.model(model))


def claimed(case: Case) -> bool:
    """Whether the model has what the method declares it needs; if not, `apply` must raise `Unsupported`."""
    method, seen = case.made(), view(case.model)
    language = isinstance(seen, VisionLanguage)
    encoder = seen.encoder if isinstance(seen, VisionLanguage) else seen
    needs = method.needs().values()
    if (encoder.packed and not language) or (encoder.maps and not method.maps):
        return False
    parts = method.parts()
    leaves = any(part.site == "block" or (part.site == "pixels" and (part.resizes or not encoder.groups)) for part in parts)
    if leaves and isinstance(seen, VisionLanguage) and (seen.mixes or encoder.packed):
        return False
    if method.virtual and isinstance(seen, VisionLanguage) and (seen.windowed or seen.masked_above):
        return False
    if method.site == "layer" and not language:
        return False
    if any(isinstance(need, LastAttention) for need in needs) and not language:
        return False
    if any(isinstance(need, ClassAttention | ClassLikeness) for need in needs) and not encoder.has_class:
        return False
    return encoder.resizable or not method.resizes


def renumbers(model: str) -> bool:
    """Whether positions without gaps mean something to a model."""
    seen = view(model)
    return isinstance(seen, VisionLanguage) and seen.rotary_rows == 1 and not seen.windowed


def needed(case: Case) -> bool:
    """Variants are for models that cannot do without them, and for one of each kind that can."""
    plain = Case(case.method, (), case.model)
    return not case.fields or not claimed(plain) or case.model in (LLAVA, "CLIPVisionModel")


ALL = [Case(method, fields, model) for method, fields in variants() for model in tiny.BUILDERS]
REFUSED = [case for case in ALL if not claimed(case)]
EVERY = [case for case in ALL if claimed(case) and needed(case)]
REDUCIBLE = [model for model in tiny.BUILDERS if any(case.model == model for case in EVERY)]
MAPS = [model for model in REDUCIBLE if getattr(view(model), "maps", False)]  # where only a method that leaves maps can act
CASES = [case for case in EVERY if case.model not in INNER]
LANGUAGE_CASES = [case for case in CASES if case.model in LANGUAGE]
ENCODER_CASES = [case for case in CASES if isinstance(view(case.model), Encoder)]
VIRTUAL = [case for case in LANGUAGE_CASES if case.made().virtual]  # merged tokens act at several places at once
RECOMPUTABLE = [as_recomputed(case) for case in LANGUAGE_CASES]
RESTORING = [case for case in LANGUAGE_CASES if case.made().restores]  # all tokens are there again behind the encoder
WHOLE = [case for case in LANGUAGE_CASES if case.made().finishes]  # hands on as many tokens as there were
AT_THE_DOOR = [case for case in LANGUAGE_CASES if case.made().site != "layer" and case not in [*VIRTUAL, *WHOLE, *RESTORING]]
IN_LAYERS = [case for case in LANGUAGE_CASES if case.made().site == "layer"]
IN_A_LAYER = [case for case in IN_LAYERS if hasattr(case.made(), "layer")]


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [_weighed(case) for case in cases], ids=str)


def _weighed(case: Case) -> Any:
    """A case as pytest's parameter; slow where a sister family stands in for it."""
    speakers = ("divprune", "fastv") if case.model in LANGUAGE_ONLY else SPEAKERS
    spoken_for = case.model in SISTERS and case.method not in speakers
    return pytest.param(case, marks=pytest.mark.slow) if spoken_for else case


def coordinates(case: Case) -> bool:
    """Whether positions are time, height and width, which cannot be renumbered."""
    seen = view(case.model)
    return isinstance(seen, VisionLanguage) and seen.rotary_rows > 1


both_attentions = pytest.mark.parametrize("attention", ATTENTIONS)


def structure_policy(method: Method, newlines: str | None = None) -> str:
    return newlines or method.newlines
