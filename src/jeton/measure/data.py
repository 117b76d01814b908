"""Questions about pictures: the embedded ones, or a JSONL file of image path, question and answer."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

OnBadLine = Literal["stop", "skip"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One question about one picture. Questions of the same `scene` show the same picture; any of `answers` is right."""

    picture: Path | Image.Image
    text: str
    answers: tuple[str, ...]
    scene: str

    @property
    def image(self) -> Image.Image:
        """The picture in RGB, read from disk at each access."""
        if isinstance(self.picture, Image.Image):
            return self.picture.convert("RGB")
        with Image.open(self.picture) as image:
            return image.convert("RGB")


class BadLine(ValueError):
    """A line of a data file cannot be used. The message names the file, the line and what is wrong."""


def read_questions(path: str | os.PathLike[str], on_bad_line: OnBadLine = "stop") -> list[Question]:
    """The questions of a JSONL file with one object a line: {"image": path, "question": text, "answer": text}.

    Image paths are relative to the file. "answer" may be a list of accepted answers. A bad line (no JSON, a field missing, an
    image missing or corrupt) stops with its number, or is skipped with a warning.
    """
    if on_bad_line not in ("stop", "skip"):
        raise ValueError(f'on_bad_line must be "stop" or "skip", got {on_bad_line!r}.')
    path, found, checked = Path(path), [], set[Path]()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found.append(_question(line, path.parent, checked))
            except (ValueError, OSError) as error:
                message = f"{path.name}, line {number}: {error}"
                if on_bad_line == "stop":
                    raise BadLine(f"{message} Mend the line, or go on without it by skipping bad lines.") from error
                _log.warning("%s The line is skipped.", message)
    if not found:
        raise ValueError(f"{path.name} holds no usable question.")
    return found


def as_questions(examples: Iterable[Any]) -> list[Question]:
    """Questions from objects with `.image`, `.question` and `.answer` (as the embedded examples), or from `Question`s."""
    return [item if isinstance(item, Question) else _from_example(item, i) for i, item in enumerate(examples)]


def sample(questions: Sequence[Question], limit: int | None, seed: int = 0) -> list[Question]:
    """At most `limit` questions: whole scenes, drawn at random, so that second turns find a partner."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} asks nothing; give at least 1.")
    if limit is None or limit >= len(questions):
        return list(questions)
    scenes = list(dict.fromkeys(question.scene for question in questions))
    random.Random(seed).shuffle(scenes)
    rank = {scene: place for place, scene in enumerate(scenes)}
    return sorted(questions, key=lambda question: rank[question.scene])[:limit]


def partners(questions: Sequence[Question]) -> list[int | None]:
    """For each question the number of another one about the same scene (the next, in a circle), or None."""
    members: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        members.setdefault(question.scene, []).append(number)
    found: list[int | None] = [None] * len(questions)
    for circle in members.values():
        for here, after in zip(circle, circle[1:] + circle[:1], strict=True):
            found[here] = after if after != here else None
    return found


def _question(line: str, folder: Path, checked: set[Path]) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON ({error.msg}).") from error
    if not isinstance(row, dict):
        raise ValueError("this is not a JSON object.")
    for field in ("image", "question", "answer"):
        if field not in row:
            raise ValueError(f"the field {field!r} is missing.")
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    picture = folder / str(row["image"])
    if picture not in checked:
        check_image(picture)
        checked.add(picture)
    return Question(picture, str(row["question"]), tuple(str(answer) for answer in answers), str(picture))


def check_image(path: Path) -> None:
    """Refuse a picture that is missing or cannot be decoded, with a sentence."""
    if not path.is_file():
        raise ValueError(f"there is no image {path}.")
    try:
        with Image.open(path) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {path} cannot be read, it may be corrupt.") from error


def _from_example(item: Any, number: int) -> Question:
    try:
        picture = getattr(item, "path", None) or item.image
        return Question(picture, item.question, (item.answer,), str(getattr(item, "scene", number)))
    except AttributeError as error:
        lacking = f"example {number}, a {type(item).__name__}, must have .image, .question and .answer"
        raise TypeError(f"{lacking}; {error}.") from error
