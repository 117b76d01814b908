"""Methods that are trained: the modules they own, how these are built for an encoder, and their weights on disk.

At inference a learned method is a method like any other: it finds its modules among its signals and returns a `Reduction`. In
training tokens stay, and it says instead with which weight each is seen (`soften`), unless its matrix is differentiable itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

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

    `masking` says how it is trained: tokens stay and are masked by `soften`; or, where false, by `reduce` as it stands, whose
    matrix carries gradients itself.
    """

    masking: ClassVar[bool] = True
    weights: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weights, os.PathLike):
            object.__setattr__(self, "weights", os.fspath(self.weights))
        if self.weights is not None and not isinstance(self.weights, str):
            raise TypeError(f"weights must be the path of a file or folder, got {self.weights!r}.")

    def build(self, shape: Shape) -> nn.Module | None:
        """New modules for an encoder; None where there is nothing to train but the encoder itself."""
        return None

    def lessons(self, n: int, depth: int) -> list[Method | None]:
        """What `steps` is at inference, in training."""
        return self.steps(n, depth)

    def soften(self, tokens: Tokens, signals: Signals) -> Tokens:
        """One step in training: as many tokens, with the `policy` by which later blocks see them, and whatever of features, sizes
        and score the step changes. Differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is trained.")

    def sight(self, query: Tensor, key: Tensor, tokens: Tokens, signals: Signals) -> Tensor | None:
        """For the site attention: (B, H, N, N) true where a query attends to a key, None for everywhere; from queries and keys
        (B, H, N, d) of a block and the tokens in front of it (their features are not to be read)."""
        return None

    def imitated(self, query: Tensor, key: Tensor, scale: float, tokens: Tokens, signals: Signals) -> Tensor | None:
        """For the site attention, in training: what this block adds to the loss; the mean over blocks counts."""
        return None

    def losses(self, softened: list[Tokens], learned: nn.Module | None, shape: Shape) -> dict[str, Tensor]:
        """What it adds to the loss of its task, by name, weights included: from the tokens as each step left them, and from what
        is being learned."""
        return {}

    def taken(self, state: dict[str, Tensor], trained: Shape) -> dict[str, Tensor]:
        """What it uses, by its own fields, of weights that were trained on an encoder of some shape; by default all."""
        return state

    def fits(self, trained: Shape, shape: Shape) -> bool:
        """Whether modules that were trained on one encoder can be used on another."""
        return trained.width == shape.width

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


def read(method: Learned) -> tuple[dict[str, Tensor], Shape]:
    """The weights a method names, as they were saved, and the shape of the encoder they were trained for."""
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
    return state, Shape(**json.loads(told["shape"]))


def load(method: Learned, shape: Shape) -> nn.Module | None:
    """The modules a method has for an encoder of this shape, with the weights it names: of the shape they were trained on."""
    state, before = read(method)
    module = method.build(before)
    if module is None:
        return None
    own, state = module.state_dict(), method.taken(state, before)
    wrong = [name for name in {**own, **state} if name not in own or name not in state or own[name].shape != state[name].shape]
    if wrong or not method.fits(before, shape):
        differs = f" (first difference: {wrong[0]})" if wrong else ""
        raise ValueError(
            f"the weights {method.weights} were trained on an encoder with {before}; they do not fit {method.spec} on one with "
            f"{shape}{differs}."
        )
    module.load_state_dict(state)
    return module


def _file(path: str | os.PathLike[str], method: Method) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / f"{method.card.id}.safetensors"
