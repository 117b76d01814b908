"""Methods x budgets on a model and a data set: what each keeps of the accuracy, and what it costs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

from ..method import Budget, Method
from .data import Question, as_questions, sample
from .machine import describe
from .plan import FULL, KEEP, Case, check_budgets, plan, requested
from .row import Row, Tally, caution
from .shown import Shown, choose, show
from .speak import Speaker
from .subject import Subject, load_subject
from .table import WIDE, table
from .trial import Trial, partner_of

EFFORT = 15_000  # rows times questions asked of the embedded model: a minute and a half of one core, three where it is slow


@dataclass(frozen=True)
class Comparison:
    """What was measured: one row a method and budget, the full model first, and a few examples to look at."""

    model: str
    machine: dict[str, str | int]
    settings: dict[str, Any]
    rows: list[Row]
    shown: list[Shown] = field(default_factory=list, repr=False)

    def table(self, width: int = WIDE) -> Table:
        """The rows as a rich table that is at most `width` characters wide."""
        return table(self, width)

    @property
    def caution(self) -> str:
        """Why the times are rough, if they are."""
        return caution(self.rows[0], -(-self.settings["questions"] // self.settings["batch_size"]))

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return {"model": self.model, "machine": self.machine, "settings": self.settings, "rows": rows}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.html`, which needs no other file, and `compare.json` into a folder; the page's path."""
        from .report import write_report

        return write_report(self, Path(folder))

    def __str__(self) -> str:
        console = Console(width=WIDE, color_system=None)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()


def compare(
    model: str | PreTrainedModel | None = None,
    processor: ProcessorMixin | None = None,
    examples: Iterable[Any] | None = None,
    methods: Sequence[str | Method] | None = None,
    keep: Sequence[int | float] = KEEP,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    batch_size: int = 32,
    controls: bool = True,
    second_turn: bool = True,
    pictures: int = 4,
    progress: bool = True,
    bridges: Sequence[str | os.PathLike[str]] = (),
) -> Comparison:
    """Compare token-reduction methods at several budgets.

    Args:
        model: a path, an id or a loaded model; None for the embedded one.
        processor: the model's processor, where it cannot be loaded from where the model came from.
        examples: objects with `.image`, `.question`, `.answer` (and `.scene` where several share a picture); None for the
            embedded ones. See `jeton.measure.data.read_questions` for files.
        methods: names, specs or methods; None for all that are registered. A spec that sets its own amount is one row.
        keep: budgets, as counts (int) or fractions (float) of an image's tokens.
        limit: at most this many questions; None asks all, of the embedded ones as many as take about two minutes.
        seed: draws the questions where `limit` leaves some out, and is the seed of methods that have one.
        controls: put random, uniform, pool and downsample beside whatever is compared.
        second_turn: also ask another question about the same picture on the cache of the first.
        pictures: examples whose kept tokens are shown in the report.
        bridges: checkpoints of trained bridges (`jeton.bridge`), a row each: models of their own, which need no method.
    """
    names = requested(methods, controls)
    rows_to_come = 1 + len(plan(names, check_budgets(keep))) + len(bridges)
    if limit is None and examples is None:
        limit = max(96, EFFORT // rows_to_come)
    subject = load_subject(model, processor, device, dtype)
    questions = sample(as_questions(subject.examples if examples is None else examples), limit, seed)
    speaker = Speaker(subject.model, subject.processor)
    trial = Trial(speaker, speaker.answer_length(questions), second_turn)
    tokens = trial.warm_up(questions[:batch_size])
    budgets = check_budgets(keep, tokens)
    cases = [(case, trial) for case in (FULL, *plan(names, budgets, seed))]
    for path in bridges:
        beside = load_subject(path, None, device, dtype)
        its = Trial(Speaker(beside.model, beside.processor), trial.max_new_tokens, second_turn)
        cases.append((_as_it_is(beside, its.warm_up(questions[:batch_size]), tokens, budgets), its))
    tallies = _measure(cases, questions, batch_size, progress)
    rows = [Row.of(tally, tallies[0]) for tally in tallies]
    shown = show(trial, choose(tallies, questions, pictures), questions, tallies)
    settings = {"questions": len(questions), "keep": list(budgets), "seed": seed, "batch_size": batch_size}
    settings |= {"device": str(subject.model.device), "dtype": str(subject.model.dtype).removeprefix("torch."), "tokens": tokens}
    return Comparison(subject.name, describe(subject.model.device), settings, rows, shown)


def _as_it_is(subject: Subject, tokens: int, full: int, budgets: Sequence[int | float]) -> Case:
    """The row of a bridged model, at the budget that is as many tokens if there is one."""
    bridge = getattr(subject.model, "bridge", None)
    if bridge is None:
        raise ValueError(f"{subject.name} has no bridge; compare it by itself, with model=.")
    equal = (each for each in budgets if Budget(each).count(full) == tokens)
    return Case(f"bridge {bridge.card.id}", None, next(equal, tokens))


def _measure(cases: Sequence[tuple[Case, Trial]], questions: Sequence[Question], batch_size: int, progress: bool) -> list[Tally]:
    """Every case, by its own trial, on every batch.

    All cases take a batch before the next one comes, each time from another start: they meet the machine in the same state.
    """
    tallies = [Tally(case) for case, _ in cases]
    trials = [trial for _, trial in cases]
    partners = partner_of(questions)
    starts = range(0, len(questions), batch_size)
    with _bar(len(starts) * len(cases), progress) as advance:
        for start in starts:
            batch = questions[start : start + batch_size]
            seconds = partners[start : start + batch_size]
            inputs = {trial: trial.speaker.encode(batch) for trial in dict.fromkeys(trials)}
            order = [*range(len(cases))]
            first = (start * 7) % len(cases)
            for number in order[first:] + order[:first]:
                tally, trial = tallies[number], trials[number]
                if tally.reason is None:
                    trial.run(tally, inputs[trial], batch, seconds)
                advance(tally.case)
    return tallies


@contextmanager
def _bar(total: int, visible: bool) -> Iterator[Any]:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not visible, transient=True) as progress:
        task = progress.add_task("full", total=total)

        def advance(case: Case) -> None:
            progress.update(task, advance=1, description=f"{case.label} {'' if case.keep is None else case.keep}")

        yield advance
