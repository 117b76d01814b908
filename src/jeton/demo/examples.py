"""The held-out scenes and questions that come with the package: written once by training, read by everyone else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jeton.demo.data import make_scene
from jeton.demo.questions import KINDS, ask

SCENES = Path(__file__).parent / "scenes"
_QUESTIONS = "questions.jsonl"
_SEED = 20_000


@dataclass(frozen=True)
class Example:
    """One question about one held-out scene.

    Examples with the same `scene` show the same image, so one can be asked as a second turn after another.
    `boxes` are the digits' boxes (left, top, right, bottom) in pixels.
    """

    path: Path
    question: str
    answer: str
    kind: str
    scene: int
    boxes: tuple[tuple[int, int, int, int], ...]

    @property
    def image(self) -> Image.Image:
        """The scene as an RGB image, read from disk at each access."""
        with Image.open(self.path) as image:
            return image.convert("RGB")


def load_examples(folder: Path = SCENES) -> list[Example]:
    """All held-out questions, ordered by scene."""
    rows = [json.loads(line) for line in (folder / _QUESTIONS).read_text().splitlines()]
    return [
        Example(folder / row["image"], row["question"], row["answer"], row["kind"], row["scene"],
                tuple(tuple(box) for box in row["boxes"]))
        for row in rows
    ]  # fmt: skip


def write_examples(folder: Path = SCENES, count: int = 200) -> list[Example]:
    """Draws the held-out scenes, always the same, and writes them with one question of each kind that can be asked."""
    rng = np.random.default_rng(_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        scene, name = make_scene(rng, "held-out"), f"{number:03d}.png"
        Image.fromarray(scene.image).save(folder / name, optimize=True)
        boxes = [digit.box for digit in scene.digits]
        for kind in KINDS:
            choices = [question for question in ask(scene.digits) if question.kind == kind]
            if choices:
                chosen = choices[rng.integers(len(choices))]
                row = {
                    "image": name,
                    "question": chosen.text,
                    "answer": chosen.answer,
                    "kind": kind,
                    "scene": number,
                    "boxes": boxes,
                }
                lines.append(json.dumps(row))
    (folder / _QUESTIONS).write_text("\n".join(lines) + "\n")
    return load_examples(folder)
