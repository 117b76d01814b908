"""The one trainer of the project, on accelerate: `train(model, data, loss, recipe, out=...)`. Needs jeton[train].

It knows nothing of what it trains. A `Recipe` says how long and how fast; `data` is a map-style dataset or a function from the
step to a batch; `loss` maps (model, batch) to a scalar or to named scalars, which are added. A run can be interrupted at any
time and goes on with `resume=True` as if it never had been; weights are written with safetensors.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler, default_collate
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

WEIGHTS = "model.safetensors"


@runtime_checkable
class Examples(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Loss = Callable[[Any, Any], Tensor | Mapping[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, a linear warm-up, then a cosine to `floor` x `rate`.

    steps        optimizer steps
    rate         peak learning rate
    batch        examples in a batch, where the data are a dataset
    rates        factors on the rate for parameters whose names begin so: {"encoder.": 0.1}; the longest beginning counts
    warmup       share of the steps over which the rate rises
    decay        weight decay of matrices; vectors (norms, biases) have none
    clip         largest norm of the gradient; None for any
    average      decay of a moving average of the weights, which is then what is kept; None for the weights themselves
    precision    "float32" or "bfloat16" (autocast)
    seed         of the order of examples and of every random draw in training
    workers      processes that prepare batches; 0 prepares them between steps
    """

    steps: int
    rate: float
    batch: int = 32
    rates: Mapping[str, float] = field(default_factory=dict)
    warmup: float = 0.05
    floor: float = 0.0
    decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 1.0
    average: float | None = None
    precision: str = "float32"
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
        if not (isinstance(self.rate, int | float) and math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate must be a positive number, got {self.rate!r}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps in [0, 1), got {self.warmup!r}.")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f'precision must be "float32" or "bfloat16", got {self.precision!r}.')
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must be None or in (0, 1), got {self.average!r}.")

    def factor(self, step: int) -> float:
        """The learning rate at a step, as a share of its peak."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        fallen = 0.5 - 0.5 * math.cos(math.pi * (step - rise) / max(1, self.steps - rise))
        return 1 - (1 - self.floor) * fallen


@dataclass
class History:
    """What a run tells: means of each loss over every `every` steps, and the seconds it took, interruptions left out."""

    every: int
    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, step: int, means: Mapping[str, float]) -> None:
        self.steps.append(step)
        for name, value in means.items():
            self.losses.setdefault(name, []).append(value)

    def last(self) -> dict[str, float]:
        return {name: values[-1] for name, values in self.losses.items()}


def train(
    model: nn.Module,
    data: Examples | Callable[[int], Any],
    loss: Loss,
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    name: str = "training",
    collate: Callable[[list[Any]], Any] = default_collate,
    save_every: int | None = None,
) -> History:
    """Train the parameters of `model` that require gradients, in place; returns the history.

    With `out`, the state is written there every `save_every` steps (a tenth of all by default) and when the run is interrupted;
    `resume=True` goes on from it, to the very numbers of an uninterrupted run. At the end the weights stand in
    out/model.safetensors (or as `save_pretrained` writes them) and the history in out/history.json.

    Raises ValueError where there is nothing to train, where `out` holds an interrupted run that is neither resumed nor removed or
    was made by another recipe, and FloatingPointError where a loss is no longer finite.
    """
    trainable = {key: value for key, value in model.named_parameters() if value.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train.")
    folder = None if out is None else _Folder(Path(out), recipe)
    if folder is not None:
        folder.check(resume)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        loop = _Loop(model, trainable, data, loss, recipe, collate)
        history = loop.run(folder, resume, progress, name, save_every or max(1, recipe.steps // 10))
    if folder is not None:
        folder.finish(model, history)
    return history


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Read the weights that `train` wrote into a model of the same shape, modules that were put into a transformers model among
    them, which `from_pretrained` would leave out."""
    path = str(Path(folder) / WEIGHTS)
    if not isinstance(model, PreTrainedModel):
        load_model(model, path)
        return model
    own, found = model.state_dict(), load_file(path)
    # `save_pretrained` writes some families under the names that their checkpoints have
    written = revert_weight_conversion(model, dict(own))
    place = {value.data_ptr(): name for name, value in own.items()}
    names = {name: place.get(value.data_ptr(), name) for name, value in written.items()}
    state = {names.get(name, name): value for name, value in found.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {name for name, value in own.items() if place[value.data_ptr()] != name}
    if unexpected or tied.union(missing) != tied:
        wrong = [*unexpected, *(name for name in missing if name not in tied)]
        raise ValueError(f"the weights in {folder} are of another model: {wrong[0]} and {len(wrong) - 1} more do not match.")
    return model


class _Loop:
    """Everything of a run that moves."""

    def __init__(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        data: Examples | Callable[[int], Any],
        loss: Loss,
        recipe: Recipe,
        collate: Callable[[list[Any]], Any],
    ) -> None:
        Accelerator = _accelerator()
        self.accelerator = Accelerator()
        self.bare, self.loss, self.recipe, self.data, self.collate = model, loss, recipe, data, collate
        optimizer = torch.optim.AdamW(_groups(trainable, recipe), lr=recipe.rate, betas=recipe.betas)
        schedule = LambdaLR(optimizer, recipe.factor)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = schedule  # steps once per optimizer step, however many processes there are
        self.accelerator.register_for_checkpointing(schedule)
        self.average: AveragedModel | None = None
        if recipe.average is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average), use_buffers=True)
            self.accelerator.register_for_checkpointing(self.average)
        self.trainable = list(trainable.values())

    def run(self, folder: _Folder | None, resume: bool, shown: bool, name: str, save_every: int) -> History:
        recipe, done = self.recipe, 0
        history = History(every=max(1, recipe.steps // 100))
        if folder is not None and resume and folder.state.exists():
            history, done = folder.read()
            self.accelerator.load_state(str(folder.state))
        sums: dict[str, Tensor] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeRemainingColumn(), TextColumn("{task.fields[losses]}"))  # fmt: skip
        self.model.train()
        start, before, since = time.perf_counter(), history.seconds, done
        with Progress(*columns, disable=not (shown and self.accelerator.is_main_process)) as bar:
            task = bar.add_task(name, total=recipe.steps, completed=done, losses="")
            try:
                for batch in self._loader(done):
                    for part, value in self._step(batch).items():
                        sums[part] = sums[part] + value if part in sums else value
                    done += 1
                    if done % history.every == 0 or done == recipe.steps:
                        means = _means(sums, done - since, done)
                        history.add(done, means)
                        sums, since = {}, done
                        bar.update(task, losses="  ".join(f"{key} {value:.3f}" for key, value in means.items()))
                    bar.update(task, completed=done)
                    if folder is not None and done % save_every == 0 and done < recipe.steps:
                        history.seconds = before + time.perf_counter() - start
                        folder.write(self.accelerator, history, done)
            except KeyboardInterrupt:
                if folder is not None:
                    print(f"interrupted after step {done}; resume=True goes on from the last state in {folder.path}")
                raise
        history.seconds = before + time.perf_counter() - start
        if self.average is not None:
            self.bare.load_state_dict(self.average.module.state_dict())
        self.bare.eval()
        return history

    def _step(self, batch: Any) -> dict[str, Tensor]:
        recipe, device = self.recipe, self.accelerator.device
        mixed = torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext()
        with mixed:
            found = self.loss(self.model, batch)
        named = {"loss": found} if isinstance(found, Tensor) else dict(found)
        self.optimizer.zero_grad()
        self.accelerator.backward(torch.stack([value.float() for value in named.values()]).sum())
        if recipe.clip is not None:
            self.accelerator.clip_grad_norm_(self.trainable, recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.bare)
        return {part: value.detach() for part, value in named.items()}

    def _loader(self, done: int) -> Any:
        """The batches from step `done` on, the same ones whether or not the run was interrupted there."""
        recipe, count = self.recipe, self.accelerator.num_processes
        # a generator of its own, so that starting to read draws nothing from the one training draws from
        ahead: dict[str, Any] = {"num_workers": recipe.workers, "generator": torch.Generator().manual_seed(recipe.seed)}
        source: Any
        if isinstance(self.data, Examples):
            order = _Order(len(self.data), recipe.batch, recipe.seed, done * count, recipe.steps * count)
            source, collate = self.data, self.collate
        else:
            order = _Order(recipe.steps * count, 1, None, done * count, recipe.steps * count)
            source, collate = _Drawn(self.data), _only
        return self.accelerator.prepare(DataLoader(source, batch_sampler=order, collate_fn=collate, **ahead))


class _Order(Sampler[list[int]]):
    """Batches of indices: epoch after epoch in an order that only the seed decides, from batch `start` up to `stop`."""

    drop_last = True

    def __init__(self, length: int, batch: int, seed: int | None, start: int, stop: int) -> None:
        if length < batch:
            raise ValueError(f"a batch of {batch} examples cannot be drawn from {length}; use a smaller batch.")
        self.length, self.batch_size, self.seed, self.start, self.stop = length, batch, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        whole = self.length // self.batch_size  # batches in an epoch; what does not fill one waits for the next order
        for number in range(self.start, self.stop):
            epoch, at = divmod(number, whole)
            if number == self.start or at == 0:
                order = self._epoch(epoch)
            yield order[at * self.batch_size : (at + 1) * self.batch_size]

    def _epoch(self, epoch: int) -> list[int]:
        if self.seed is None:
            return list(range(self.length))
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)).tolist()


class _Drawn:
    """A function from the step to a batch, as a dataset."""

    def __init__(self, draw: Callable[[int], Any]) -> None:
        self.draw = draw

    def __getitem__(self, step: int) -> Any:
        return self.draw(step)


def _only(batches: Sequence[Any]) -> Any:
    return batches[0]


class _Folder:
    """Where a run keeps its state. The state is written beside the old one and then swapped, so that one is always whole."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.state, self.recipe = path, path / "state", asdict(recipe)
        self.told = json.loads(json.dumps(self.recipe))

    def check(self, resume: bool) -> None:
        if not self.state.exists():
            return
        if not resume:
            raise ValueError(f"{self.path} holds an interrupted run; go on with resume=True, or remove {self.state}.")
        before = json.loads((self.state / "run.json").read_text())["recipe"]
        changed = [key for key in self.told if before.get(key) != self.told[key]]
        if changed:
            raise ValueError(
                f"the run in {self.path} was begun with {changed[0]}={before.get(changed[0])!r}, not {self.told[changed[0]]!r}; "
                f"resume it with its own recipe, or remove {self.state}."
            )

    def read(self) -> tuple[History, int]:
        told = json.loads((self.state / "run.json").read_text())
        return History(**told["history"]), told["done"]

    def write(self, accelerator: Any, history: History, done: int) -> None:
        fresh = self.path / "state.new"
        shutil.rmtree(fresh, ignore_errors=True)
        accelerator.save_state(str(fresh))
        if accelerator.is_main_process:
            told = {"recipe": self.told, "history": asdict(history), "done": done}
            (fresh / "run.json").write_text(json.dumps(told))
            shutil.rmtree(self.state, ignore_errors=True)
            fresh.rename(self.state)

    def finish(self, model: nn.Module, history: History) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        save: Any = getattr(model, "save_pretrained", None)
        if save is not None:
            save(self.path)
        else:
            save_model(model, str(self.path / WEIGHTS))
        (self.path / WEIGHTS).chmod(0o644)  # safetensors writes it for its owner only
        (self.path / "history.json").write_text(json.dumps(asdict(history)) + "\n")
        shutil.rmtree(self.state, ignore_errors=True)


def _groups(trainable: Mapping[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by rate and weight decay."""
    unknown = [start for start in recipe.rates if not any(name.startswith(start) for name in trainable)]
    if unknown:
        raise ValueError(f"rates names {unknown[0]!r}, but no trained parameter begins so; they are {', '.join(trainable)}.")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in trainable.items():
        begin = max((start for start in recipe.rates if name.startswith(start)), key=len, default=None)
        factor = 1.0 if begin is None else recipe.rates[begin]
        groups.setdefault((factor, recipe.decay if value.dim() > 1 else 0.0), []).append(value)
    return [{"params": params, "lr": recipe.rate * factor, "weight_decay": decay} for (factor, decay), params in groups.items()]


def _means(sums: Mapping[str, Tensor], count: int, step: int) -> dict[str, float]:
    means = {name: float(value) / count for name, value in sums.items()}
    for name, value in means.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} by step {step}; lower the rate, or look at the data.")
    return means


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as missing:
        raise ImportError("training needs accelerate: pip install 'jeton[train]'.") from missing
    return Accelerator
