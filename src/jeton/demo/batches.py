"""Training batches: scenes with their targets, and conversations about them packed into one sequence each."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from jeton.demo.chat import assistant_turn, user_turn
from jeton.demo.data import BACKGROUND, COLOURS, GRID, NUMBERS, Digit, Scene, make_scene
from jeton.demo.losses import Batch
from jeton.demo.model import IMAGE
from jeton.demo.questions import ask, describe

MAX_QUESTIONS = 6
_IGNORED = -100


class Batches(IterableDataset):
    """An endless source of training batches, fixed by its seed. Crowded scenes teach patches more per step. `asked` marks the
    position in front of an answer's first word, or of every word. `tokens`: an image has so many placeholders, all visible,
    for models that do not show the language model every patch."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        size: int,
        seed: int,
        crowded: bool = False,
        every_word: bool = False,
        tokens: int | None = None,
    ) -> None:
        self.size, self.crowded, self.every_word, self.tokens = size, crowded, every_word, tokens
        self._rng = np.random.default_rng(seed)
        self._pad, self._bos = tokenizer.pad_token_id, tokenizer.bos_token_id
        self._image = tokenizer.convert_tokens_to_ids(IMAGE)
        self._tokenizer = tokenizer

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        scenes = [make_scene(self._rng, "train", self.crowded) for _ in range(self.size)]
        owner = np.stack([scene.owner for scene in scenes])
        number = np.stack([_patch_classes(s, [d.value for d in s.digits], len(NUMBERS)) for s in scenes])
        colour = np.stack([_patch_classes(s, [_colour(d) for d in s.digits], len(COLOURS)) for s in scenes])
        pixels = np.stack([scene.image for scene in scenes])
        ids, labels, asked = self._conversations(scenes)
        return Batch(
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1,
            number=torch.from_numpy(number),
            colour=torch.from_numpy(colour),
            owner=torch.from_numpy(owner),
            present=torch.from_numpy(np.stack([_present(scene) for scene in scenes])),
            ids=torch.from_numpy(ids),
            attended=torch.from_numpy(self._visible(ids, owner) if self.tokens is None else (ids != self._pad).astype(np.int64)),
            labels=torch.from_numpy(labels),
            asked=torch.from_numpy(asked),
        )

    def _conversations(self, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and labels (B, T), padded on the right: the tail of a causal sequence disturbs nothing."""
        rows = [self._conversation(scene) for scene in scenes]
        ids = np.full((len(rows), max(len(row) for row, *_ in rows)), self._pad)
        labels, asked = np.full_like(ids, _IGNORED), np.full_like(ids, -1)
        for i, (row, answers, digits) in enumerate(rows):
            ids[i, : len(row)], labels[i, : len(row)], asked[i, : len(row)] = row, answers, digits
        return ids, labels, asked

    def _conversation(self, scene: Scene) -> tuple[list[int], list[int], list[int]]:
        """Several questions and descriptions of one scene in random order, as turns of one conversation."""
        questions = ask(scene.digits)
        chosen = [questions[i] for i in self._rng.permutation(len(questions))[:MAX_QUESTIONS]]
        turns = chosen + describe(scene.digits)
        ids, labels, digits = [self._bos], [_IGNORED], [-1]
        for turn, which in enumerate(self._rng.permutation(len(turns))):
            asked = self._encode(user_turn(turns[which].text, first=turn == 0))
            answered = self._encode(assistant_turn(turns[which].answer))
            asked = [x for token in asked for x in ([token] * (self.tokens or GRID**2) if token == self._image else [token])]
            ids += asked + answered
            labels += [_IGNORED] * len(asked) + answered
            words = len(answered) - 1 if self.every_word else 1  # the end mark needs no looking
            digits += [-1] * (len(asked) - 1) + [turns[which].digit] * words + [-1] * (len(answered) + 1 - words)
        return ids, labels, digits

    def _encode(self, text: str) -> list[int]:
        """Token ids of a turn."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _visible(self, ids: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """Attention mask (B, T) that hides a random share of the background patches of every other scene.

        So the decoder does not learn to rely on there being exactly GRID * GRID image tokens,
        and the encoder does not learn to keep facts about the scene in the background.
        """
        share = self._rng.random((len(ids), 1)) * (self._rng.random((len(ids), 1)) < 0.5)
        hidden = (owner < 0) & (self._rng.random(owner.shape) < share)
        visible = ids != self._pad
        visible[ids == self._image] &= ~hidden.ravel()
        return visible.astype(np.int64)


def _colour(digit: Digit) -> int:
    return list(COLOURS).index(digit.colour)


def _patch_classes(scene: Scene, of_digits: list[int], neither: int) -> np.ndarray:
    """Class of every patch (P,) from the classes of the scene's digits."""
    table = np.array([*of_digits, _IGNORED, neither])  # the last two are reached as owner UNCLEAR and BACKGROUND
    assert table[BACKGROUND] == neither
    return table[scene.owner]


def _present(scene: Scene) -> np.ndarray:
    """Multi-hot (pairs + numbers + colours,) float32 of what is in the scene."""
    pairs = np.zeros((len(NUMBERS), len(COLOURS)), dtype=np.float32)
    for digit in scene.digits:
        pairs[digit.value, _colour(digit)] = 1
    return np.concatenate([pairs.ravel(), pairs.max(1), pairs.max(0)])
