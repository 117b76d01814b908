"""Talking to a vision-language model in batches: prompts, greedy answers, and a second question on the cache of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, ProcessorMixin

from .data import Question

_ANSWER = "%%ANSWER%%"  # stands where the answer goes while a conversation is rendered


@dataclass(frozen=True)
class Turn:
    """A finished first turn of a batch: what was said, and what a second one continues from."""

    answers: list[str]
    sequences: Tensor  # (B, P + A) prompt and answer
    mask: Tensor  # (B, P + A) true for the prompt and for the answer's words, false for padding and what follows the end mark
    cache: Cache


class Speaker:
    """A model and its processor, spoken to in whatever words the model's chat template asks for."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prompt(self, *turns: str) -> str:
        """The text of a conversation about one picture: question, answer, question, ... ending where the model is to answer."""
        if getattr(self.processor, "chat_template", None):
            messages = [_message(text, i) for i, text in enumerate(turns)]
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text = f"USER: <image>\n{turns[0]} ASSISTANT:"
        for answer, question in zip(turns[1::2], turns[2::2], strict=True):
            text += f" {answer} USER: {question} ASSISTANT:"
        return text

    def encode(self, questions: Sequence[Question]) -> Any:
        """A batch of first questions, padded on the left, on the model's device."""
        prompts = [self.prompt(question.text) for question in questions]
        images = [question.image for question in questions]
        inputs = self.processor(
            images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt", **self._specials(prompts[0])
        )
        return inputs.to(self.model.device, self.model.dtype)

    def answered(self, question: Question) -> Any:
        """One question with its first accepted answer behind it, and the answer's tokens as `labels`: an input for `tune`."""
        prompt = self.prompt(question.text)
        text = prompt + ("" if prompt[-1:].isspace() else " ") + question.answers[0]
        specials = self._specials(prompt)
        inputs = self.processor(images=[question.image], text=[text], return_tensors="pt", **specials)
        lengths = [len(self.tokenizer(each, **specials)["input_ids"]) for each in (prompt, text)]
        labels = inputs["input_ids"].clone()
        labels[:, : lengths[0] - lengths[1]] = -100
        inputs["labels"] = labels
        return inputs.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def ask(self, inputs: Any, max_new_tokens: int) -> Turn:
        """The model's greedy answers to a batch of first questions."""
        out = self._generate(max_new_tokens, **inputs)
        start = inputs["input_ids"].shape[1]
        said = out.sequences[:, start:]
        words = self._before_end(said)
        mask = torch.cat([inputs["attention_mask"].bool(), words], 1)
        return Turn(self._decode(said), out.sequences, mask, out.past_key_values)

    @torch.inference_mode()
    def ask_again(self, turn: Turn, first: Sequence[str], second: Sequence[str], max_new_tokens: int) -> list[str]:
        """The answers to second questions on the cache of the first turn.

        Answers differ in length, so padding stands between the turns; the mask hides it and positions skip it. Only what the
        cache lacks is passed: the last column of the first turn, and the text that follows an answer.
        """
        texts = [self._follow_up(a, b) for a, b in zip(first, second, strict=True)]
        more = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        more = more.to(turn.sequences.device)
        ids = torch.cat([turn.sequences[:, -1:], more["input_ids"]], 1)
        mask = torch.cat([turn.mask, more["attention_mask"].bool()], 1).long()
        out = self._generate(max_new_tokens, input_ids=ids, attention_mask=mask, past_key_values=turn.cache)
        return self._decode(out.sequences[:, ids.shape[1] :])

    def answer_length(self, questions: Sequence[Question]) -> int:
        """Tokens that suffice to see whether an answer is right: those of the longest accepted one, and the end mark."""
        answers = {f" {answer}" for question in questions for answer in question.answers}
        return 1 + max(len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)

    def _follow_up(self, first: str, second: str) -> str:
        """The text between an answer to `first` and the answer to `second`."""
        whole = self.prompt(first, _ANSWER, second)
        _, found, after = whole.partition(_ANSWER)
        if not found:
            raise ValueError("the model's chat template does not print the assistant's answers, so it cannot hold a second turn.")
        return after

    def _generate(self, max_new_tokens: int, **inputs: Any) -> Any:
        generate: Any = self.model.generate
        return generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )

    def _decode(self, ids: Tensor) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _before_end(self, said: Tensor) -> Tensor:
        """(B, A) true for the tokens of an answer that stand before its end mark."""
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        ended = torch.isin(said, torch.tensor(ends, device=said.device))
        return ended.cumsum(1) == 0

    def _specials(self, text: str) -> dict[str, bool]:
        """A template that writes the start mark itself must not get a second one."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def _message(text: str, turn: int) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "text", "text": text}]
    if turn == 0:
        content.insert(0, {"type": "image"})
    return {"role": "assistant" if turn % 2 else "user", "content": content}
