"""What pipelines of experts share: crops, prompts kept as data, and the strict reading of a language model's answers."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from PIL.Image import Image
from torch import Tensor

from .experts import Messages

Templates = Mapping[str, Mapping[str, str]]


def crop(image: Image, box: Tensor) -> Image:
    """The part of an image inside a box (x0, y0, x1, y1) in pixels, rounded outwards and cut to the image."""
    x0, y0, x1, y1 = box.tolist()
    inside = (max(0, math.floor(x0)), max(0, math.floor(y0)), min(image.width, math.ceil(x1)), min(image.height, math.ceil(y1)))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise ValueError(f"the box {(x0, y0, x1, y1)} shows nothing of a {image.width} x {image.height} image.")
    return image.crop(inside)


@cache
def templates(system: str) -> Templates:
    """The prompts of a system, from its data file: by name, a `system` and a `user` text with named slots in braces."""
    return tomllib.loads(resources.files(__package__).joinpath(f"{system}.toml").read_text(encoding="utf-8"))


def chat(template: Mapping[str, str], **slots: object) -> Messages:
    """A chat of a template with its slots filled."""
    return [{"role": role, "content": template[role].format(**slots).strip()} for role in ("system", "user")]


def numbered(texts: Sequence[str], name: str) -> str:
    """Texts as lines `name 1: ...`, line breaks within them as spaces."""
    return "\n".join(f"{name} {number}: {' '.join(text.split())}" for number, text in enumerate(texts, 1))


def sentences(text: str) -> list[str]:
    """A text cut behind each full stop, question and exclamation mark that a space follows."""
    return [part for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part]


@dataclass(frozen=True)
class Statement:
    """A sentence, and the number of the text it stands in, counted from 1."""

    text: str
    source: int


@dataclass(frozen=True)
class Groups:
    """Sentences of several texts about one thing: what they agree on, sets of sentences that contradict each other, and what only
    one says."""

    same: tuple[str, ...] = ()
    contradictory: tuple[tuple[Statement, ...], ...] = ()
    unique: tuple[Statement, ...] = ()


_HEADING = re.compile(r"[#*\s]*(SAME|CONTRADICTORY|UNIQUE)\s*:?[*\s]*")
_NONE = re.compile(r"(- *)?\(?none\)?\.?", re.IGNORECASE)
_SAME = re.compile(r'- *"(.+)"')
_ONE = re.compile(r' *"(.+)" \((\d+)\) *')


def read_groups(answer: str, texts: int) -> Groups | None:
    """A language model's answer as groups, None where it does not keep to the format. The three headings, once each and in any
    order, each followed by its items or `- none`; what stands in front of the first heading is ignored.

        SAME
        - "sentence"
        CONTRADICTORY
        - "sentence" (1) | "sentence" (2)
        UNIQUE
        - "sentence" (3)

    Numbers say which of the texts, 1 to `texts`, a sentence is from.
    """
    lines: dict[str, list[str]] = {}
    under = None
    for line in filter(None, map(str.strip, answer.splitlines())):
        heading = _HEADING.fullmatch(line)
        if heading:
            under = heading.group(1)
            if under in lines:
                return None
            lines[under] = []
        elif under and not _NONE.fullmatch(line):
            lines[under].append(line)
    if len(lines) != 3:
        return None
    same = [_SAME.fullmatch(line) for line in lines["SAME"]]
    sets = [_statements(line, texts) for line in lines["CONTRADICTORY"]]
    alone = [_statements(line, texts) for line in lines["UNIQUE"]]
    if not all(same) or not all(len(one) > 1 for one in sets) or not all(len(one) == 1 for one in alone):
        return None
    return Groups(tuple(one.group(1) for one in same if one), tuple(sets), tuple(one[0] for one in alone))


def _statements(line: str, texts: int) -> tuple[Statement, ...]:
    """The statements of an item, none where one of them is not written as agreed."""
    if not line.startswith("-"):
        return ()
    found = [_ONE.fullmatch(part) for part in re.split(r"(?<=\)) *\| *(?=\")", line[1:])]
    if not all(one and 1 <= int(one.group(2)) <= texts for one in found):
        return ()
    return tuple(Statement(one.group(1), int(one.group(2))) for one in found if one)


def reliable(groups: Groups, score: Callable[[Sequence[Statement]], Sequence[float]], threshold: float) -> list[str]:
    """The sentences to believe: all that are agreed on, unscored; of each contradiction the best (the first of equals) if it
    scores above the threshold; of the unique ones those above it."""
    doubtful = [one for group in groups.contradictory for one in group] + list(groups.unique)
    scores = dict(zip(doubtful, score(doubtful), strict=True)) if doubtful else {}
    best = [max(group, key=scores.__getitem__) for group in groups.contradictory]
    kept = [one.text for one in (*best, *groups.unique) if scores[one] > threshold]
    return list(dict.fromkeys([*groups.same, *kept]))
