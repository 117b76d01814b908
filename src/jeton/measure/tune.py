"""`tune`: calibrates a method on a model and data. The method says what is searched and how, this what a candidate is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from ..calibration import Calibration, Study
from ..engine import apply, watch
from ..method import Method, get, known, untunable
from ..method import Sequence as Chain
from ..models import VisionLanguage, adapt
from ..ops.search import check_sampler

Score = Callable[[Any, dict[str, Any]], float]
OBJECTIVES = ("answer", "cosine")


def tune(
    model: nn.Module,
    method: str | Method,
    data: Iterable[Mapping[str, Any]],
    *,
    score: Score | None = None,
    objective: str | None = None,
    calls: int | None = None,
    warmup: int | None = None,
    sampler: str = "auto",
    seed: int = 0,
    positions: str = "keep",
    progress: bool = False,
    **fields: Any,
) -> Method:
    """A new method whose fields are calibrated on a vision-language model and data, such as ``tune(model, "vflowopt", data)``.

    method, fields: as for `apply`; of a method with nothing to calibrate a TypeError says which have.
    data: prepared inputs, each a mapping as the model's processor makes it; a batch in one counts as its samples.
    score: what the answers are worth, ``score(model, inputs) -> float``, higher is better, called with the candidate applied.
    objective: what is maximised where no `score` is given. "answer": the likelihood of the inputs' `labels`, exp of the mean log
    probability of a token that is not -100. "cosine": between the state of the last token behind the last layer with and without
    the candidate. None leaves it to the method.
    calls: how many candidates a search of a space tries, None for the method's own; the first `warmup` of them are drawn at
    random. sampler: "gp" (needs scipy), "tpe", "random", or "auto", the first that is installed. positions: as for `apply`.

    The result's `calibration` holds all trials; `save` writes it, and ``jeton.get(id, calibration=path)`` reads it. The result is
    for this language model: share it with models of the same depth only.
    """
    made = get(method, **fields)
    if isinstance(made, Chain):
        raise TypeError(f"tune calibrates one method at a time; name one of {made.spec}.")
    if type(made).calibrated is Method.calibrated:
        raise TypeError(untunable(made))
    check_sampler(sampler)
    objective = objective or made.objective
    if objective not in OBJECTIVES:
        raise ValueError(f"there is no objective {objective!r}; choose {' or '.join(map(repr, OBJECTIVES))}, or pass score=.")
    view = adapt(model)
    if not isinstance(view, VisionLanguage):
        raise TypeError(f"{type(model).__name__} has no language model to calibrate on.")
    inputs = list(_prepared(data, model, needs_labels=score is None and objective == "answer"))
    name = objective if score is None else getattr(score, "__name__", "score")
    worth = score or (_answer if objective == "answer" else _Cosine(model, view))
    with _evaluating(model), _shown(progress, made.spec, name) as tell:
        tokens, full = _whole(model, worth, inputs)
        study = Study(
            partial(_candidate, model, worth, inputs, positions, tell), len(view.layers), tokens,
            calls or made.calls, made.warmup if warmup is None else warmup, sampler, seed, _full=full,
        )  # fmt: skip
        tuned = made.calibrated(study)
        best = study.score(tuned)
    found = Calibration(
        method=tuned.card.id, fields=tuned.changed, objective=name, model=type(model).__name__, data=sum(map(_samples, inputs)),
        full=study.full, score=best, sampler=study.searched, seed=seed, space=study.space, trials=tuple(study.trials),
        notes=tuple(study.notes),
    )  # fmt: skip
    return known(tuned, found)


# -- what a candidate is worth -----------------------------------------------------------------------------------------------


def _candidate(
    model: nn.Module, worth: Score, inputs: list[dict], positions: str, tell: Callable[[float], None], method: Method | None
) -> float:
    assert method is not None
    with apply(model, method, positions=positions):
        score = _mean(model, worth, inputs)
    tell(score)
    return score


def _whole(model: nn.Module, worth: Score, inputs: list[dict]) -> tuple[int, float]:
    """Visual tokens of the largest image, and the score with all tokens."""
    tokens, total = 0, 0.0
    with watch(model) as run:
        for each in inputs:
            total += float(worth(model, each)) * _samples(each)
            tokens = max([tokens, *(image.before for image in run.report().images)])
    if not tokens:
        raise ValueError("no picture was found in the data; calibration inputs must show what is to be reduced.")
    return tokens, total / sum(map(_samples, inputs))


def _mean(model: nn.Module, worth: Score, inputs: list[dict]) -> float:
    return sum(float(worth(model, each)) * _samples(each) for each in inputs) / sum(map(_samples, inputs))


def _samples(inputs: Mapping[str, Any]) -> int:
    return len(inputs["input_ids"])


@torch.no_grad()
def _answer(model: nn.Module, inputs: dict[str, Any]) -> float:
    return float(model(**inputs).loss.exp().reciprocal())


class _Cosine:
    """Remembers the states of the first round, which is that with all tokens."""

    def __init__(self, model: nn.Module, view: VisionLanguage) -> None:
        self.decoder: Any = view.decoder
        self.whole: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> float:
        state = self._state(model, inputs)
        whole = self.whole.setdefault(id(inputs), state)
        return float(torch.nn.functional.cosine_similarity(state, whole, dim=-1).mean())

    def _state(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """(B, D) float32 behind the last layer at each sample's last token, which stands as far from the end however many visual
        tokens went."""
        heard: list[Tensor] = []
        handle = self.decoder.register_forward_hook(lambda module, args, output: heard.append(output[0]))
        try:
            model(**{name: value for name, value in inputs.items() if name != "labels"})
        finally:
            handle.remove()
        mask = inputs.get("attention_mask")
        back = torch.zeros(len(heard[0]), dtype=torch.long, device=heard[0].device)
        if mask is not None:
            back = mask.flip(1).to(torch.uint8).argmax(1)
        return heard[0][torch.arange(len(back), device=back.device), -1 - back].float()


# -- around it ---------------------------------------------------------------------------------------------------------------


def _prepared(data: Iterable[Mapping[str, Any]], model: nn.Module, needs_labels: bool) -> Iterator[dict[str, Any]]:
    """The inputs on the model's device and in its dtype; what cannot be used is refused by its number."""
    parameter = next(model.parameters())
    number = -1
    for number, item in enumerate(data):
        if not isinstance(item, Mapping) or "input_ids" not in item:
            raise TypeError(f"calibration input {number} must be a mapping with input_ids, as a processor makes it.")
        if needs_labels and item.get("labels") is None:
            raise ValueError(
                f'calibration input {number} has no labels, which the objective "answer" scores; put the answer into the '
                'prompt and labels (-100 elsewhere) beside it, pass score=, or choose objective="cosine".'
            )
        moved = {name: value.to(parameter.device) if isinstance(value, Tensor) else value for name, value in item.items()}
        floating = {name for name, value in moved.items() if isinstance(value, Tensor) and value.is_floating_point()}
        yield {name: value.to(parameter.dtype) if name in floating else value for name, value in moved.items()}
    if number < 0:
        raise ValueError("tune needs at least one calibration input.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


@contextmanager
def _shown(progress: bool, spec: str, objective: str) -> Iterator[Callable[[float], None]]:
    """A progress bar that counts candidates and shows the best score."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"tuning {spec}", total=None, best="")
        best = float("-inf")

        def tell(score: float) -> None:
            nonlocal best
            best = max(best, score)
            bar.update(task, advance=1, best=f"best {objective} {best:.4f}")

        yield tell
