"""One method on one batch: attach it, ask, ask again, count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import engine
from ..method import Unsupported
from .data import Question, partners
from .plan import FULL, Case
from .row import Tally
from .score import is_right
from .speak import Speaker, Turn


class Trial:
    """Runs cases on a speaker's model."""

    def __init__(self, speaker: Speaker, max_new_tokens: int, second_turn: bool = True) -> None:
        self.speaker, self.max_new_tokens, self.second_turn = speaker, max_new_tokens, second_turn

    def attach(self, case: Case, batch: int = 0) -> engine.Run:
        """The engine's run of a case on the model for one batch; of the full model it only counts."""
        method = case.drawn(batch)
        return engine.watch(self.speaker.model) if method is None else engine.apply(self.speaker.model, method)

    def warm_up(self, questions: Sequence[Question]) -> int:
        """Run the full model once; the visual tokens of its largest image."""
        inputs = self.speaker.encode(questions)
        with self.attach(FULL) as run:
            self.speaker.ask(inputs, self.max_new_tokens)
            return max(image.before for image in run.report().images)

    def run(self, tally: Tally, inputs: Any, batch: Sequence[Question], after: Sequence[Question | None]) -> None:
        """Ask a batch, and another question about each picture (`after`), with the tally's method; add to the tally.

        A method that the model lacks something for, or that cannot reach its budget on it, leaves its reason.
        """
        try:
            with self.attach(tally.case, len(tally.sizes)) as run:
                turn = self.speaker.ask(inputs, self.max_new_tokens)
                _count(tally, run.report(), len(batch))
                second = self._second(turn, batch, after)
        except (Unsupported, ValueError) as error:
            tally.reason = str(error)
            return
        tally.said += turn.answers
        tally.right += [is_right(said, question.answers) for said, question in zip(turn.answers, batch, strict=True)]
        pairs = zip(second, after, strict=True) if second else ()
        tally.second += [is_right(said, question.answers) for said, question in pairs if question is not None]

    def _second(self, turn: Turn, batch: Sequence[Question], after: Sequence[Question | None]) -> list[str]:
        """Answers to the second questions; a question without partner is asked again and not counted."""
        if not self.second_turn or not any(after):
            return []
        texts = [(question or first).text for question, first in zip(after, batch, strict=True)]
        return self.speaker.ask_again(turn, [question.text for question in batch], texts, self.max_new_tokens)


def partner_of(questions: Sequence[Question]) -> list[Question | None]:
    """For each question another one about the same picture, if there is any."""
    return [None if number is None else questions[number] for number in partners(questions)]


def _count(tally: Tally, report: engine.Report, questions: int) -> None:
    """Add what the report of one batch says: tokens per image, FLOPs, and seconds before the first token."""
    tally.before += [image.before for image in report.images]
    tally.after += [image.after for image in report.images]
    tally.flops += report.flops
    tally.sizes.append(questions)
    tally.seconds.append(report.seconds["first_token"].median)
    for name, timing in report.seconds.items():
        tally.stages.setdefault(name, []).append(timing.median)
