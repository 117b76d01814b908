"""Small networks trained on handwritten digits, and copies of them fine-tuned, each on a task of its own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

WIDTH = 256


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10)
    )


class Study:
    """A base, and one copy of it fine-tuned on each task with the head frozen. A task is a choice of digits or a view of them;
    half of its pictures are for training, the others are held out."""

    def __init__(self, tasks: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]], start: int, rate: float) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x, y = (torch.tensor(pixels, dtype=torch.float32) / 8 - 1)[order].view(-1, 8, 8), torch.tensor(labels)[order]
        self.tasks = {task: view(x, y) for task, view in tasks.items()}
        torch.manual_seed(0)
        base = network()
        self._fit(base, x[:900], y[:900], start, 1e-2)
        self.base = base.state_dict()
        self.tuned: dict[str, Mapping[str, Tensor]] = {}
        for task, (pictures, digits) in self.tasks.items():
            model, half = deepcopy(base), len(digits) // 2
            model[5].requires_grad_(False)
            self._fit(model, pictures[:half], digits[:half], 40, rate)
            self.tuned[task] = model.state_dict()

    def _fit(self, model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> None:
        optimiser = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x.flatten(1)), y).backward()
            optimiser.step()

    def _answers(self, task: str, weights: Mapping[str, Tensor], held_out: bool) -> tuple[Tensor, Tensor]:
        x, y = self.tasks[task]
        part = slice(len(y) // 2, None) if held_out else slice(len(y) // 2)
        model = network()
        model.load_state_dict(dict(weights))
        with torch.no_grad():
            return model(x[part].flatten(1)), y[part]

    def accuracy(self, task: str, weights: Mapping[str, Tensor]) -> float:
        """Accuracy on held-out pictures of a task, out of all ten digits."""
        logits, y = self._answers(task, weights, held_out=True)
        return float((logits.argmax(1) == y).float().mean())

    def mean(self, weights: Mapping[str, Tensor]) -> float:
        return sum(self.accuracy(task, weights) for task in self.tasks) / len(self.tasks)

    def score(self, task: str, weights: Mapping[str, Tensor]) -> float:
        """What parameters are chosen by: the likelihood of the training half's answers."""
        logits, y = self._answers(task, weights, held_out=False)
        return float(nn.functional.cross_entropy(logits, y).neg().exp())

    def added(self, scale: float) -> dict[str, Tensor]:
        """The base plus the scaled sum of task vectors."""
        start = self.base
        return {name: start[name] + scale * sum(model[name] - start[name] for model in self.tuned.values()) for name in start}


def _some(*digits: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def view(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.isin(y, torch.tensor(digits))
        return x[chosen], y[chosen]

    return view


@pytest.fixture(scope="session")
def digits() -> Study:
    """Tasks that are three of the ten digits each (the last one four)."""
    return Study({"small": _some(0, 1, 2), "middle": _some(3, 4, 5), "large": _some(6, 7, 8, 9)}, start=20, rate=1e-3)


@pytest.fixture(scope="session")
def views() -> Study:
    """Tasks that are all digits, turned, mirrored or upside down."""
    turned, mirrored, flipped = (
        (lambda x, y: (x.rot90(1, (1, 2)), y)),
        (lambda x, y: (x.flip(2), y)),
        (lambda x, y: (x.flip(1), y)),
    )
    return Study({"turned": turned, "mirrored": mirrored, "flipped": flipped}, start=40, rate=3e-3)


class Counted(Mapping[str, Tensor]):
    """Weights that know how many bytes of them are in use at once: every reading is a copy of its own."""

    now = most = 0

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        value = self._weights[name].clone()
        Counted.now += value.nbytes
        Counted.most = max(Counted.most, Counted.now)
        weakref.finalize(value, Counted._gone, value.nbytes)
        return value

    @staticmethod
    def _gone(size: int) -> None:
        Counted.now -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@pytest.fixture
def counted() -> type[Counted]:
    gc.collect()
    Counted.now = Counted.most = 0
    return Counted
