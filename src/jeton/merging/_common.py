"""What every merger stands on: checkpoints read tensor by tensor and written shard by shard, and task vectors.

A checkpoint is a mapping from names to tensors; one in a folder reads a tensor when it is asked for and keeps none. A task vector
is what fine-tuning changed, theta_t - theta_0, always in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
Source = Weights | nn.Module | str | Path

INDEX = "model.safetensors.index.json"
SHARD = 5_000_000_000  # bytes of one file, as transformers writes them


# -- reading -----------------------------------------------------------------------------------------------------------


class Folder(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors (one file, or shards with an index), read when asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = _files(self.path)
        self._open = {file: safe_open(file, framework="pt") for file in files}
        self._file = {name: file for file, handle in self._open.items() for name in handle.keys()}  # noqa: SIM118
        if len(self._file) < sum(len(handle.keys()) for handle in self._open.values()):
            raise ValueError(f"{self.path} holds some tensors in two files; leave only those of one checkpoint there.")

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._file[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file))

    def __len__(self) -> int:
        return len(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return tuple(self._open[self._file[name]].get_slice(name).get_shape())


def read(source: Source) -> Weights:
    """A checkpoint from a model, a state dict, or a file or folder of safetensors. Tied tensors of a model are listed once,
    under the name that sorts first."""
    if isinstance(source, nn.Module):
        seen: dict[tuple[Any, ...], str] = {}
        state = source.state_dict()
        for name in sorted(state):
            value = state[name]
            seen.setdefault((value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,), name)
        return {name: state[name] for name in seen.values()}
    return source if isinstance(source, Mapping) else Folder(source)


def aligned(base: Weights, models: Sequence[Weights]) -> list[str]:
    """The names that are merged, sorted: the floating-point tensors. Refuses models whose names or shapes differ."""
    names = sorted(base)
    for number, model in enumerate(models):
        lost, more = sorted(set(names) - set(model)), sorted(set(model) - set(names))
        if lost or more:
            listed = "; ".join(f"{what} {', '.join(some[:3])}" for what, some in (("lacks", lost), ("has also", more)) if some)
            raise ValueError(f"model {number} is no fine-tuned form of the base: it {listed}. Only equal architectures merge.")
        for name in names:
            if _shape(model, name) != _shape(base, name):
                a, b = _shape(model, name), _shape(base, name)
                raise ValueError(f"{name} of model {number} is {a}, that of the base {b}; only equal architectures merge.")
    return [name for name in names if base[name].is_floating_point()]


def load(module: nn.Module, weights: Weights) -> nn.Module:
    """Put merged weights into a model, in place. Tied tensors follow the one that is listed."""
    odd = module.load_state_dict(dict(weights), strict=False)
    missing = set(odd.missing_keys) & set(read(module))
    if missing or odd.unexpected_keys:
        raise ValueError(f"the weights are not this model's: {sorted(missing | set(odd.unexpected_keys))[:4]} do not match.")
    return module


# -- writing -----------------------------------------------------------------------------------------------------------


class Shards:
    """Writes a checkpoint file by file as tensors arrive, holding at most `size` bytes. What is not finished leaves nothing."""

    def __init__(self, out: str | Path, like: str | Path | None = None, size: int = SHARD) -> None:
        self.out, self.size, self.like = Path(out), size, None if like is None else Path(like)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"{self.out} is not empty; give a new folder to write to.")
        self._part = self.out.with_name(self.out.name + ".part")
        self._held: dict[str, Tensor] = {}
        self._bytes, self._total, self._shards = 0, 0, list[list[str]]()

    def __enter__(self) -> Self:
        self._part.mkdir(parents=True)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor more; a full shard goes to disk first."""
        if self._held and self._bytes + tensor.nbytes > self.size:
            self._flush()
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self._part, ignore_errors=True)
            return
        self._flush()
        n, where = len(self._shards), {}
        for number, names in enumerate(self._shards):
            final = "model.safetensors" if n == 1 else f"model-{number + 1:05}-of-{n:05}.safetensors"
            (self._part / f"{number}.safetensors").rename(self._part / final)
            where.update(dict.fromkeys(names, final))
        if n > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": where}
            (self._part / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        if self.like is not None and self.like.is_dir():
            for file in sorted(self.like.iterdir()):  # configuration, tokenizer: all but weights
                if (
                    file.is_file()
                    and file.suffix not in (".safetensors", ".bin", ".pt", ".pth")
                    and "index.json" not in file.name
                ):
                    shutil.copy2(file, self._part / file.name)
        if self.out.exists():
            self.out.rmdir()
        self._part.rename(self.out)

    def _flush(self) -> None:
        if self._held or not self._shards:
            save_file(self._held, self._part / f"{len(self._shards)}.safetensors", {"format": "pt"})
            self._shards.append(list(self._held))
            self._held, self._bytes = {}, 0


class Merger:
    """Base of mergers. A subclass yields the merged tensors one by one; here they become a dict or a folder."""

    def tensors(self, base: Weights, models: Sequence[Weights]) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors, each as soon as it is known, in float32 where they are floating-point."""
        raise NotImplementedError(f"{type(self).__name__} must say how it merges.")

    def merge(
        self, base: Source, models: Sequence[Source], out: str | Path | None = None, *, shard: int = SHARD
    ) -> dict[str, Tensor] | Path:
        """Merge fine-tuned `models` of one `base`: the weights as a dict, or the folder `out` they were written to, with the
        base's configuration and tokenizer beside them. Tensors have the base's data type."""
        start, tuned = read(base), [read(model) for model in models]
        if not tuned:
            raise ValueError("there is nothing to merge; give at least one fine-tuned model.")
        aligned(start, tuned)
        return collect(cast(self.tensors(start, tuned), start), out, base, shard)


def cast(tensors: Iterable[tuple[str, Tensor]], like: Weights) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in the data type it has in `like`."""
    for name, value in tensors:
        yield name, value.to(like[name].dtype)


def collect(
    tensors: Iterable[tuple[str, Tensor]], out: str | Path | None, like: Source | None = None, size: int = SHARD
) -> dict[str, Tensor] | Path:
    """A stream of tensors as a dict, or written to the folder `out`."""
    if out is None:
        return dict(tensors)
    with Shards(out, like if isinstance(like, str | Path) else None, size) as shards:
        for name, value in tensors:
            shards.add(name, value)
    return Path(out)


# -- task vectors ------------------------------------------------------------------------------------------------------


def change(model: Weights, base: Weights, name: str) -> Tensor:
    """One tensor of a task vector: theta_t - theta_0, float32."""
    start = base[name]
    return model[name].to(start.device, torch.float32) - start.float()


def norm(tensors: Iterable[Tensor]) -> float:
    """The global L2 norm over all entries of all tensors, summed in float64."""
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors)) ** 0.5


def threshold(chunks: Callable[[], Iterable[Tensor]], share: float) -> float:
    """The magnitude that the largest `share` of all entries reach, exactly, without holding them: two passes over `chunks`,
    counting the upper, then the lower 16 bits of |x| as float32, which order like the numbers themselves."""
    total, upper = 0, torch.zeros(1 << 16, dtype=torch.long)
    for chunk in chunks():
        total += chunk.numel()
        upper += torch.bincount((_bits(chunk) >> 16), minlength=1 << 16)
    wanted = max(1, round(share * total))
    if wanted >= total:
        return 0.0
    above = upper.flip(0).cumsum(0).flip(0)  # entries in this bin or higher
    high = int((above >= wanted).nonzero().max())
    wanted -= int(above[high] - upper[high])
    lower = torch.zeros(1 << 16, dtype=torch.long)
    for chunk in chunks():
        bits = _bits(chunk)
        lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low = int((lower.flip(0).cumsum(0).flip(0) >= wanted).nonzero().max())
    return float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32))


def elect(changes: Tensor) -> Tensor:
    """TIES without its trimming: where tasks disagree on the sign, the one of larger total wins and the others' changes are
    left out of the sum. (T, ...) to (...)."""
    sign = changes.sum(0).sign()
    return torch.where(changes.sign() == sign, changes, 0).sum(0)


# -- private -----------------------------------------------------------------------------------------------------------


def _bits(chunk: Tensor) -> Tensor:
    return chunk.detach().float().abs().flatten().cpu().view(torch.int32).long()


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    return weights.shape(name) if isinstance(weights, Folder) else tuple(weights[name].shape)


def _files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no safetensors file and no folder of them.")
    if (path / INDEX).exists():
        listed = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [path / file for file in sorted(set(listed.values()))]
        lost = [file.name for file in files if not file.exists()]
        if lost:
            raise FileNotFoundError(f"{path / INDEX} lists {', '.join(lost)}, which is not there; the checkpoint is incomplete.")
        return files
    files = [path / "model.safetensors"] if (path / "model.safetensors").exists() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{path} holds no safetensors; save the model with save_pretrained(..., safe_serialization=True)."
        )
    return files
