"""One question about one picture: the answer, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from .. import engine
from ..engine.picture import sheet
from ..method import Method, get
from .data import Question, check_image
from .plan import Case
from .shown import seen
from .speak import Speaker
from .subject import load_subject
from .trial import Trial


@dataclass(frozen=True)
class Reply:
    """An answer, the engine's report, and for a method the pictures the model saw with their assignment maps."""

    answer: str
    report: engine.Report
    pictures: list[Image.Image]
    maps: list[Tensor]

    def picture(self, size: int = 448) -> Image.Image:
        """What was kept, drawn over what the model saw."""
        return sheet(self.pictures, self.maps, size)


def ask(
    image: str | Path,
    question: str,
    method: str | Method | None = None,
    model: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    max_new_tokens: int = 64,
) -> Reply:
    """Ask `model` (the embedded one by default) about the picture in a file, with `method` applied where one is given."""
    made = None if method is None else get(method)
    check_image(Path(image))
    subject = load_subject(model, None, device, dtype)
    speaker = Speaker(subject.model, subject.processor)
    asked = Question(Path(image), question, (), str(image))
    inputs = speaker.encode([asked])
    with Trial(speaker, max_new_tokens).attach(Case("asked", made)) as run:
        turn = speaker.ask(inputs, max_new_tokens)
        maps = [] if made is None else [each.cpu() for each in run.assignment(0)]
        return Reply(turn.answers[0], run.report(), seen(inputs, subject.processor, asked.image), maps)
