"""Methods that are trained: the modules they own, how these are built for an encoder, and their weights on disk.

At inference a learned method is a method like any other: it finds its modules among its signals and returns a `Reduction`. In
training tokens stay, and it says instead with which weight each is seen (`soften`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .method import Method, Signals
from .needs import Trained
from .tokens import Tokens


@dataclass(frozen=True)
class Shape:
    """What a method knows of an encoder when it builds its modules: width of the tokens, attention heads, blocks that feed what
    is handed on, patches of a picture of the encoder's usual size, and special tokens in front of them."""

    width: int
    heads: int
    depth: int
    patches: int
    prefix: int


class Learned(Method):
    """Base of methods that are trained.

    `build` makes the modules; a method that cannot decide without them asks for `Trained` in `needs` and finds them, always in
    float32, as ``signals["learned"]``. `weights` names trained ones: the file, or the folder with ``<id>.safetensors`` in it.
    """

    weights: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weights, os.PathLike):
            object.__setattr__(self, "weights", os.fspath(self.weights))
        if self.weights is not None and not isinstance(self.weights, str):
            raise TypeError(f"weights must be the path of a file or folder, got {self.weights!r}.")

    def build(self, shape: Shape) -> nn.Module | None:
        """New modules for an encoder; None where there is nothing to train but the encoder itself."""
        return None

    def soften(self, tokens: Tokens, signals: Signals) -> Tokens:
        """One step in training: as many tokens, with the `policy` by which later blocks see them, and whatever of features, sizes
        and score the step changes. Differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is trained.")

    def losses(self, softened: list[Tokens], learned: nn.Module | None, shape: Shape) -> dict[str, Tensor]:
        """What it adds to the loss of its task, by name, weights included: from the tokens as each step left them, and from what
        is being learned."""
        return {}

    def resized(self, state: dict[str, Tensor], old: Shape, new: Shape) -> dict[str, Tensor]:
        """Weights that were trained on an encoder of another shape, for this one; by default as they are."""
        return state

    def flops(self, n: int, shape: Shape) -> float:
        """What its modules cost for one picture of n patches."""
        return 0.0


def needs_training(method: Method) -> bool:
    """Whether a method decides by trained modules."""
    return any(isinstance(need, Trained) for need in method.needs().values())


def save(module: nn.Module, method: Method, shape: Shape, path: str | os.PathLike[str]) -> Path:
    """Write the modules of a method to a file or, where `path` does not end so, as ``<id>.safetensors`` into a folder."""
    place = _file(path, method)
    place.parent.mkdir(parents=True, exist_ok=True)
    told = {"method": method.card.id, "spec": method.spec, "shape": json.dumps(asdict(shape))}
    save_file({name: value.detach().contiguous().cpu() for name, value in module.state_dict().items()}, place, told)
    place.chmod(0o644)  # safetensors writes it for its owner only
    return place


def load(module: nn.Module, method: Learned, shape: Shape) -> None:
    """Read the weights a method names into the modules it has built for an encoder of this shape."""
    assert method.weights is not None
    place, name = _file(method.weights, method), method.card.id
    if not place.is_file():
        raise ValueError(f"{name} was given weights={method.weights!r}, but there is no file {place}; train it first.")
    try:
        with safe_open(place, "pt") as file:
            told = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{place} is no file of weights in safetensors' format: {error}.") from error
    if told.get("method") != name:
        raise ValueError(f"{place} holds weights of {told.get('method') or 'something else'}, not of {name}.")
    state = method.resized(state, Shape(**json.loads(told["shape"])), shape)
    _check(module.state_dict(), state, place, told, shape)
    module.load_state_dict(state)


def _file(path: str | os.PathLike[str], method: Method) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / f"{method.card.id}.safetensors"


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], place: Path, told: Mapping[str, str], shape: Shape) -> None:
    wrong = [name for name in {**own, **state} if name not in own or name not in state or own[name].shape != state[name].shape]
    if wrong:
        raise ValueError(
            f"the weights in {place} were trained by {told['spec']} on an encoder with {told['shape']}; they do not fit this "
            f"method on one with {json.dumps(asdict(shape))} (first difference: {wrong[0]})."
        )
