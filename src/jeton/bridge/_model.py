"""LLaVA and LLaVA-NeXT with a bridge in the place of their projector: classes of their own, known to the Auto classes.

`config.bridge` holds the bridge's id and options, so `save_pretrained` and `AutoModelForImageTextToText.from_pretrained` work as
for any model once `jeton.bridge` is imported. The processor stays transformers' own; `fit` tells it how many placeholders to
write.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ..method import Unsupported
from ..ops.squares import side
from ..registry import find, nearest
from ._common import Bridge


class _Parts:
    """The model without its head: encoder, bridge and language model. `more`: what else it has of its own."""

    def __init__(self, config: Any, **more: Any) -> None:
        PreTrainedModel.__init__(self, config)  # LLaVA's own would make a projector
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = make(config)
        self.language_model = AutoModel.from_config(config.text_config)
        for name, value in more.items():
            setattr(self, name, value)
        self.post_init()
        self.multi_modal_projector.enter(self.vision_tower)


class _Whole:
    """The model of class `inside` and its head."""

    inside: ClassVar[type]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.inside(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.loss_type = "ForConditionalGeneration"  # transformers looks it up by the name of its own classes
        self.post_init()

    @property
    def bridge(self) -> Bridge:
        return self.model.multi_modal_projector


class BridgedLlavaConfig(LlavaConfig):
    """LLaVA's configuration and `bridge`: {"id": ..., option: value}."""

    model_type = "jeton_llava"
    bridge: dict | None = None


class BridgedLlavaModel(_Parts, LlavaModel):
    """The model without its head; `multi_modal_projector` is the bridge."""

    config_class = BridgedLlavaConfig

    @functools.wraps(LlavaModel.get_image_features)  # `generate` reads its parameters
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        encoded, bridge = super().get_image_features(*args, **kwargs), self.multi_modal_projector
        if bridge.fuses:
            rows, k = encoded.pooler_output, bridge.tokens
            encoded.pooler_output = [each[:k] for each in rows]
            # beams repeat these tensors, in an order only `generate` knows: what belongs to each is found by its identity
            encoded.context = {id(each): row[k:] for each, row in zip(encoded.pooler_output, rows, strict=True)}
        return encoded

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        instruction: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        rest = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values, **kwargs}
        encoded = (mm_encoder_outputs or {}).get("image")
        if not self.multi_modal_projector.fuses or (pixel_values is None and encoded is None):
            return super().forward(
                input_ids, pixel_values, inputs_embeds=inputs_embeds, mm_encoder_outputs=mm_encoder_outputs, **rest
            )
        if encoded is None:
            encoded = self.get_image_features(pixel_values, return_dict=True)
        return super().forward(inputs_embeds=self._fused(input_ids, encoded, attention_mask, instruction), **rest)

    def _fused(self, input_ids: Tensor | None, encoded: Any, mask: Tensor | None, instruction: Tensor | None) -> Tensor:
        """The prompt's embeddings with its pictures in it, text changed by what they show."""
        name = self.multi_modal_projector.card.id
        if input_ids is None:
            raise ValueError(f"{name} fuses pictures with the text of a prompt: pass input_ids, not inputs_embeds.")
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"{name} needs an attention mask of (batch, length), not {tuple(mask.shape)}.")
        visual = input_ids == self.config.image_token_id
        tokens = torch.stack(list(encoded.pooler_output))
        if int(visual.sum()) != tokens.shape[:2].numel():
            raise ValueError(
                f"the prompt has {int(visual.sum())} image tokens, but its {len(tokens)} images have {tokens.shape[1]} each; "
                "make it with the processor that jeton.bridge.fit returns."
            )
        context = torch.stack([encoded.context[id(each)] for each in encoded.pooler_output])
        usable = ~visual if mask is None else ~visual & mask[:, -visual.shape[1] :].bool()
        if instruction is not None:
            usable = usable & instruction
        embeds = self.get_input_embeddings()(input_ids)
        return self.multi_modal_projector.fuse(embeds, visual, tokens.to(embeds), context.to(embeds), usable)


class BridgedLlava(_Whole, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with a bridge. What `labels` mark as answers is no instruction to a bridge that fuses."""

    config_class, inside = BridgedLlavaConfig, BridgedLlavaModel

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is not None and self.bridge.fuses:
            kwargs["instruction"] = labels == -100
        return super().forward(
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds, labels=labels,
            logits_to_keep=logits_to_keep, mm_encoder_outputs=mm_encoder_outputs, **kwargs,
        )  # fmt: skip


class BridgedLlavaNextConfig(LlavaNextConfig):
    """LLaVA-NeXT's configuration and `bridge`: {"id": ..., option: value}."""

    model_type = "jeton_llava_next"
    bridge: dict | None = None


class BridgedLlavaNextModel(_Parts, LlavaNextModel):
    """The model without its head; the bridge makes a square grid of tokens of every crop, stitched as patches are."""

    config_class = BridgedLlavaNextConfig

    def __init__(self, config: BridgedLlavaNextConfig) -> None:
        text = config.text_config
        newline = nn.Parameter(torch.randn(text.hidden_size) * text.hidden_size**-0.5)
        super().__init__(config, image_newline=newline, vocab_size=text.vocab_size)

    @functools.wraps(LlavaNextModel.get_image_features)  # `generate` reads its parameters
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        self._crops: list[Tensor] = []
        try:
            encoded = super().get_image_features(*args, **kwargs)
            encoded.crops = list(self._crops)
        finally:
            del self._crops
        return encoded

    def pack_image_features(
        self,
        image_features: Sequence[Tensor],
        image_sizes: Tensor,
        vision_feature_select_strategy: str | None = None,
        image_newline: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The thumbnail's tokens, then those of the crops row by row without padding, a newline behind each row. image_features:
        for each image (1 + crops, K, d)."""
        if hasattr(self, "_crops"):
            self._crops.extend(image_features)
        packed = [self._stitched(*each, image_newline) for each in zip(image_features, image_sizes, strict=True)]
        return packed, torch.tensor([len(each) for each in packed], device=packed[0].device)

    def _stitched(self, features: Tensor, size: Tensor, newline: Tensor | None) -> Tensor:
        picture = self.config.vision_config.image_size
        rows, cols = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, picture)
        cells = side(features.shape[1])
        grid = features[1:].unflatten(1, (cells, cells)).unflatten(0, (rows, cols))
        whole = unpad_image(grid.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3), size)
        if newline is not None:
            whole = torch.cat([whole, newline[:, None, None].expand(-1, whole.shape[1], 1).to(whole)], 2)
        return torch.cat([features[0], whole.flatten(1).T])


class BridgedLlavaNext(_Whole, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` with a bridge."""

    config_class, inside = BridgedLlavaNextConfig, BridgedLlavaNextModel


BRIDGED = {
    LlavaForConditionalGeneration: (BridgedLlava, BridgedLlavaConfig),
    LlavaNextForConditionalGeneration: (BridgedLlavaNext, BridgedLlavaNextConfig),
}


def make(config: BridgedLlavaConfig | BridgedLlavaNextConfig) -> Bridge:
    """The bridge that a configuration describes, untrained."""
    options = dict(config.bridge or {})
    name = options.pop("id", None)
    if name is None:
        raise ValueError('the configuration names no bridge; set config.bridge = {"id": ..., option: value}.')
    thing = _class(name)
    known = list(inspect.signature(thing).parameters)[1:]
    wrong = [option for option in options if option not in known]
    if wrong:
        raise ValueError(f"{name} has no option {wrong[0]!r}; it has {', '.join(known)}.{nearest(wrong[0], known)}")
    return thing(config, **options)


def _class(name: str) -> type[Bridge]:
    """The bridge of this id. Only its own file is imported: a checkpoint loads quickly."""
    files = {file.name.replace("_", "-"): file.name for file in pkgutil.iter_modules([str(Path(__file__).parent)])}
    if name in files:
        module = importlib.import_module(f"{__package__}.{files[name]}")
        for thing in vars(module).values():
            if isinstance(thing, type) and issubclass(thing, Bridge) and getattr(thing, "card", None) and thing.card.id == name:
                return thing
    find(name)  # suggests what may have been meant
    raise ValueError(f"{name} is no bridge; bridges are {', '.join(id for id in files if id[0] != '-')}.")


def attach(model: Any, bridge: str, **options: Any) -> Any:
    """The same model with a bridge in the place of its projector, ready to be trained.

    Encoder and language model are not copied: they are the given model's own. What of the bridge fits the trained projector
    starts from its weights. LlavaForConditionalGeneration becomes `BridgedLlava`, LlavaNextForConditionalGeneration
    `BridgedLlavaNext`, whose bridge is asked for every crop and must make a square grid of tokens of it.
    """
    if type(model) not in BRIDGED:
        names = " or ".join(kind.__name__ for kind in BRIDGED)
        raise Unsupported(f"a bridge takes the place of the projector of a {names}, not of a {type(model).__name__}.")
    if model.config.vision_feature_select_strategy != "default" and model.config.vision_config.model_type == "clip_vision_model":
        raise Unsupported(
            'the model hands its class token on (vision_feature_select_strategy="full"); bridges read patches only.'
        )
    told = {**model.config.to_dict(), "bridge": {"id": bridge, **options}}
    told.pop("model_type")
    kind, configured = BRIDGED[type(model)]
    config = configured(**told)
    made = make(config)
    if kind is BridgedLlavaNext and (made.fuses or made.pictures > 1 or math.isqrt(made.tokens) ** 2 != made.tokens):
        raise Unsupported(
            f"{bridge} does not make a square grid of tokens of each crop, which LlavaNextForConditionalGeneration stitches; use "
            f"m3 or tokenpacker, or a LlavaForConditionalGeneration."
        )
    made.adopt(model.model.multi_modal_projector)
    if made.layers is not None:
        config.vision_feature_layer = list(made.layers)
    if made.whole:
        config.vision_feature_select_strategy = "full"
    config.image_seq_length = made.tokens
    weight = model.lm_head.weight
    with torch.device("meta"):  # everything that takes room is the given model's
        new = kind(config)
    new.model.vision_tower, new.model.language_model = model.model.vision_tower, model.model.language_model
    new.lm_head, new.model.multi_modal_projector = model.lm_head, made.to(weight.device, weight.dtype)
    made.enter(new.model.vision_tower)
    if kind is BridgedLlavaNext:
        new.model.image_newline = model.model.image_newline
    new.generation_config = copy.deepcopy(model.generation_config)
    return new.train(model.training)


def fit(processor: Any, model: Any) -> Any:
    """A copy of the processor that writes as many placeholders for an image as the model's bridge makes tokens.

    By its own settings: for LLaVA the whole picture counts as one patch, and the other K - 1 tokens as additional ones; for
    LLaVA-NeXT patches are as large as the windows that make a token. They are saved with it, so that the checkpoint's processor
    loads as any.
    """
    images = copy.copy(processor.image_processor)
    crop = getattr(images, "crop_size", None) or images.size
    if crop["height"] != crop["width"]:
        raise Unsupported(f"bridges read square pictures, but the processor makes {crop['height']} x {crop['width']}.")
    if isinstance(processor, LlavaNextProcessor):
        patch, additional = crop["height"] // side(model.bridge.tokens), processor.num_additional_image_tokens
        return type(processor)(
            image_processor=images, tokenizer=processor.tokenizer, patch_size=patch, chat_template=processor.chat_template,
            vision_feature_select_strategy=processor.vision_feature_select_strategy, image_token=processor.image_token,
            num_additional_image_tokens=additional,
        )  # fmt: skip
    own = processor.vision_feature_select_strategy == "default"  # then the processor takes one off for the class token
    return type(processor)(
        image_processor=images, tokenizer=processor.tokenizer, patch_size=crop["height"], chat_template=processor.chat_template,
        vision_feature_select_strategy=processor.vision_feature_select_strategy, image_token=processor.image_token,
        num_additional_image_tokens=model.bridge.tokens - 1 + own,
    )  # fmt: skip


def shorten(
    inputs: dict[str, Tensor], image_id: int, before: int | Sequence[int], after: int | Sequence[int]
) -> dict[str, Tensor]:
    """A batch whose images have `before` placeholders each, with `after` of them (or lists of both, image by image): input_ids
    and what goes along with them (same shape: attention_mask, labels). Rows that lose more than others are padded on the left,
    and the mask says where."""
    ids = inputs["input_ids"]
    visual = ids == image_id
    if isinstance(before, int) and isinstance(after, int):
        kept = ~visual | ((visual.cumsum(1) - 1) % before < after)
    else:
        told = [torch.arange(many) < few for many, few in zip(before, after, strict=True)]  # type: ignore[arg-type]
        kept = ~visual
        kept[visual] = torch.cat(told).to(ids.device)
    width = int(kept.sum(1).max())
    columns = kept.long().argsort(dim=1, stable=True)[:, -width:]
    left = kept.gather(1, columns)
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    cut = {name: value.gather(1, columns) if value.shape == ids.shape else value for name, value in inputs.items()}
    cut["attention_mask"] = mask.gather(1, columns) * left
    cut["input_ids"] = cut["input_ids"].masked_fill(~left, 0)
    if "labels" in cut:
        cut["labels"] = cut["labels"].masked_fill(~left, -100)
    return cut


AutoConfig.register(BridgedLlavaConfig.model_type, BridgedLlavaConfig, exist_ok=True)
AutoModel.register(BridgedLlavaConfig, BridgedLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(BridgedLlavaConfig, BridgedLlava, exist_ok=True)
AutoProcessor.register(BridgedLlavaConfig, LlavaProcessor, exist_ok=True)
AutoConfig.register(BridgedLlavaNextConfig.model_type, BridgedLlavaNextConfig, exist_ok=True)
AutoModel.register(BridgedLlavaNextConfig, BridgedLlavaNextModel, exist_ok=True)
AutoModelForImageTextToText.register(BridgedLlavaNextConfig, BridgedLlavaNext, exist_ok=True)
AutoProcessor.register(BridgedLlavaNextConfig, LlavaNextProcessor, exist_ok=True)
