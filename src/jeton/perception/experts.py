"""Experts: what a pipeline asks of a captioner, a detector, a scorer and a language model, and transformers models that answer.

An expert is anything that can be called like its protocol, a plain function included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Messages = list[dict[str, str]]  # a chat: {"role": ..., "content": ...}


@dataclass(frozen=True)
class Detection:
    """An object: box (x0, y0, x1, y1) in pixels, score in [0, 1], and its name."""

    box: tuple[float, float, float, float]
    score: float
    label: str


class Captioner(Protocol):
    """One text for each image, at a temperature (0: the likeliest words)."""

    def __call__(self, images: Sequence[Image], prompt: str, temperature: float) -> list[str]: ...


class Detector(Protocol):
    """Objects of an image, doubtful ones included: the pipeline sets the threshold."""

    def __call__(self, image: Image) -> list[Detection]: ...


class Scorer(Protocol):
    """How well each text fits the image; larger is better."""

    def __call__(self, image: Image, texts: Sequence[str]) -> list[float]: ...


class LanguageModel(Protocol):
    """One answer for each chat, at a temperature."""

    def __call__(self, chats: Sequence[Messages], temperature: float) -> list[str]: ...


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws that depend on the seed alone and leave the global random state as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(
        [] if device.type == "cpu" else [device], device_type="cuda" if device.type == "cpu" else device.type
    ):
        torch.manual_seed(seed)
        yield


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}.")
    return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}


@torch.no_grad()
def _speak(model: PreTrainedModel, inputs: Any, seed: int | None, **how: Any) -> Tensor:
    """New token ids (B, L)."""
    inputs = inputs.to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with _seeded(seed, model.device):
        ids = model.generate(**inputs, **how)
    return ids if model.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]


@dataclass(eq=False)
class VisionLanguageCaptioner:
    """Any model of AutoModelForImageTextToText with its processor. The prompt goes through the chat template if there is one;
    `wrap` makes the model's text of it otherwise. Images are read `batch` at a time; the same seed gives the same
    captions."""

    model: PreTrainedModel
    processor: ProcessorMixin
    wrap: Callable[[str], str] | None = None
    max_new_tokens: int = 256
    top_p: float = 1.0
    batch: int = 8
    seed: int | None = 0

    def __call__(self, images: Sequence[Image], prompt: str, temperature: float) -> list[str]:
        text, captions = self._text(prompt), []
        for start in range(0, len(images), self.batch):
            part = [[image.convert("RGB")] for image in images[start : start + self.batch]]
            inputs = self.processor(images=part, text=[text] * len(part), padding=True, padding_side="left", return_tensors="pt")
            seed = None if self.seed is None else self.seed + start
            how = {"max_new_tokens": self.max_new_tokens, **_sampling(temperature, self.top_p)}
            ids = _speak(self.model, inputs, seed, **how)
            captions += self.processor.batch_decode(ids, skip_special_tokens=True)
        return [caption.strip() for caption in captions]

    def _text(self, prompt: str) -> str:
        if self.wrap is not None:
            return self.wrap(prompt)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(
                f"{type(self.processor).__name__} has no chat template; give wrap=, which makes the model's text of a prompt."
            )
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@dataclass(eq=False)
class ZeroShotDetector:
    """A zero-shot object detector (OwlViTForObjectDetection, Owlv2ForObjectDetection, GroundingDinoForObjectDetection ...)
    with its processor, looking for `labels`. It names objects scored above `floor`, the `most` best of them, best first."""

    model: PreTrainedModel
    processor: ProcessorMixin
    labels: Sequence[str]
    floor: float = 0.05
    most: int = 100

    @torch.no_grad()
    def __call__(self, image: Image) -> list[Detection]:
        if not self.labels:
            raise ValueError("a zero-shot detector needs labels to look for.")
        labels = list(self.labels)
        inputs = self.processor(images=image.convert("RGB"), text=[labels], return_tensors="pt").to(self.model.device)
        found = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), threshold=self.floor, target_sizes=[(image.height, image.width)], text_labels=[labels]
        )[0]
        best = found["scores"].argsort(descending=True, stable=True)[: self.most].tolist()
        boxes, scores = found["boxes"].tolist(), found["scores"].tolist()
        return [Detection(tuple(boxes[at]), scores[at], found["text_labels"][at]) for at in best]


@dataclass(eq=False)
class BlipScorer:
    """BlipForImageTextRetrieval with its processor: (probability of a match + cosine) / 2, of the matching head and of the two
    encoders. The image is encoded once for all its texts."""

    model: PreTrainedModel
    processor: ProcessorMixin

    @torch.no_grad()
    def __call__(self, image: Image, texts: Sequence[str]) -> list[float]:
        if not texts:
            return []
        model = self.model
        inputs = self.processor(
            images=image.convert("RGB"), text=list(texts), padding=True, truncation=True, return_tensors="pt"
        ).to(model.device)
        words = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        seen = model.vision_model(pixel_values=inputs["pixel_values"][:1].to(model.dtype)).last_hidden_state
        every = seen.expand(len(texts), -1, -1)
        mask = torch.ones(every.shape[:2], dtype=torch.long, device=every.device)
        both = model.text_encoder(**words, encoder_hidden_states=every, encoder_attention_mask=mask).last_hidden_state
        match = model.itm_head(both[:, 0]).float().softmax(-1)[:, 1]
        alone = model.text_encoder(**words).last_hidden_state
        ours, theirs = model.vision_proj(seen[:, 0]).float(), model.text_proj(alone[:, 0]).float()
        return ((match + torch.cosine_similarity(ours, theirs)) / 2).tolist()


@dataclass(eq=False)
class ChatModel:
    """A causal language model with a chat template. Chats are answered `batch` at a time; the same seed gives the same
    answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 1024
    top_p: float = 0.9
    batch: int = 8
    seed: int | None = 0
    template: dict[str, Any] = field(default_factory=dict)  # what else the chat template is told, enable_thinking=False say

    def __call__(self, chats: Sequence[Messages], temperature: float) -> list[str]:
        if not self.tokenizer.chat_template:
            raise ValueError(f"{type(self.tokenizer).__name__} has no chat template; take an instruction-tuned model.")
        if self.tokenizer.pad_token is None:
            raise ValueError("this tokenizer has no padding token; set tokenizer.pad_token, tokenizer.eos_token will do.")
        answers = []
        for start in range(0, len(chats), self.batch):
            part = [list(chat) for chat in chats[start : start + self.batch]]
            told = self.tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=True, **self.template)
            inputs = self.tokenizer(told, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
            inputs.pop("token_type_ids", None)
            seed = None if self.seed is None else self.seed + start
            how = {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id}
            ids = _speak(self.model, inputs, seed, **how, **_sampling(temperature, self.top_p))
            answers += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [answer.strip() for answer in answers]
