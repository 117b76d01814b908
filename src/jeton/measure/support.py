"""Which methods work on a model: each is really applied to the model's class, without weights, and what refuses says why.

In a checkout ``python -m jeton.measure.support`` renews docs/models.md, families by methods, and the example in
docs/add-a-model.md. It needs timm.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..engine import apply
from ..method import Unsupported, methods
from ..models import Encoder, Registry, VisionLanguage, adapt, aimv2
from .blank import blank, of_class
from .systems import between


@dataclass(frozen=True)
class Verdict:
    """One method on one model. spec: what to apply: the method's id, or the id with the fields that the refusal of the id alone
    named and that turned out to work; None where neither does. reason: the last refusal, "" where there was none."""

    method: str
    spec: str | None
    reason: str

    @property
    def works(self) -> bool:
        return self.spec is not None


@dataclass(frozen=True)
class Support:
    """What `supports` found for a model."""

    model: str
    verdicts: tuple[Verdict, ...]

    @property
    def works(self) -> tuple[str, ...]:
        """The specs that work."""
        return tuple(verdict.spec for verdict in self.verdicts if verdict.spec is not None)

    @property
    def refused(self) -> dict[str, str]:
        """The methods that do not work, with the sentence that says why."""
        return {verdict.method: verdict.reason for verdict in self.verdicts if not verdict.works}

    def to_dict(self) -> dict[str, Any]:
        rows = [{"method": v.method, "works": v.works, "spec": v.spec, "reason": v.reason} for v in self.verdicts]
        return {"model": self.model, "methods": rows}

    def __str__(self) -> str:
        """What works, then each reason once, as the first method it holds for has it."""
        lines = [f"{self.model}: {len(self.works)} of {len(self.verdicts)} methods work", *_wrapped("", self.works)]
        whys: dict[str, list[Verdict]] = {}
        for verdict in self.verdicts:
            if not verdict.works:
                whys.setdefault(_nameless(verdict, (self.model,)), []).append(verdict)
        for first, *others in whys.values():
            lines += ["", first.reason, *_wrapped("The same: ", [one.method for one in others])]
        return "\n".join(lines)


def _wrapped(begin: str, names: Sequence[str]) -> list[str]:
    return (
        textwrap.wrap(begin + ", ".join(names), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        if names
        else []
    )


def supports(model: str | Path | nn.Module) -> Support:
    """Which methods work on `model`, and why others do not. Every method is applied and taken out again.

    model: a model; a path or an id, of which only the configuration is read; a class such as "LlavaForConditionalGeneration"; a
    type such as "qwen2_5_vl"; or a timm model such as "timm/vit_base_patch16_224".

    Raises `Unsupported` if jeton has no adapter for the model, `ValueError` if the name means nothing.
    """
    net = blank(model)
    adapt(net)
    return Support(type(net).__name__, tuple(_tried(net, card.id) for card in methods()))


def _tried(net: nn.Module, method: str) -> Verdict:
    reason = _refusal(net, method)
    if not reason:
        return Verdict(method, method, "")
    named = re.search(rf"\b{re.escape(method)}\([^()]+\)", reason)
    if named is None:
        return Verdict(method, None, reason)
    again = _refusal(net, named[0])
    return Verdict(method, None, again) if again else Verdict(method, named[0], reason)


def _refusal(net: nn.Module, spec: str) -> str:
    """Why a spec cannot be applied; "" if it can."""
    try:
        apply(net, spec).remove()
    except (Unsupported, ValueError) as refusal:  # a layer that a model does not have is a ValueError
        return str(refusal)
    return ""


# -- the document ------------------------------------------------------------------------------------------------------------


def families() -> list[str]:
    """One class for each adapter, encoders first, in alphabetical order: the first of those it is registered under."""
    found: list[str] = []
    for shelf in (Registry.encoders, Registry.models):
        first: dict[type, str] = {}
        for name, view in shelf.items():
            first.setdefault(view, name)
        found += sorted(first.values())
    return found


def page() -> str:
    """docs/models.md: families by methods. Families that do the same with every method, for the same reasons, share a column."""
    found = {name: _support(name) for name in families()}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, support in found.items():
        alike = tuple(verdict.spec or _nameless(verdict, _names(name)) for verdict in support.verdicts)
        groups.setdefault(alike, []).append(name)
    columns = {_letters(number): names for number, names in enumerate(groups.values())}
    whys: dict[str, str] = {}
    rows = ["| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for at, card in enumerate(methods()):
        cells = [_cell(found[names[0]].verdicts[at], _names(names[0]), whys) for names in columns.values()]
        rows.append(f"| [`{card.id}`](systems.md#{card.id}) | {' | '.join(cells)} |")
    return "\n\n".join(
        [
            "# Models and methods",
            "Written by `python -m jeton.measure.support`, which applies every method to every family (the real classes, without "
            "weights) and writes down what happened; do not edit. `jeton supports MODEL` does the same for one model, by its id, "
            "folder, class or type. How a family is added: [add-a-model.md](add-a-model.md).",
            "## Families",
            "\n".join(["| | class | what it is |", "|---|---|---|", *_listed(columns)]),
            "## Methods on families",
            "**yes**, yes with the fields shown, or the number of the reason why not.",
            "\n".join(rows),
            "## Reasons",
            "As one of the families says it; the others say the same with their own names.",
            "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(whys.values(), 1)),
        ]
    ) + "\n"  # fmt: skip


def _letters(number: int) -> str:
    """A to Z, then AA, AB and so on."""
    return (_letters(number // 26 - 1) if number > 25 else "") + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number % 26]


def _support(name: str) -> Support:
    net = of_class(name)
    return Support(name, tuple(_tried(net, card.id) for card in methods()))


def _listed(columns: dict[str, list[str]]) -> list[str]:
    return [f"| {letter} | `{name}` | {_what(name)} |" for letter, names in columns.items() for name in names]


def _what(name: str) -> str:
    """A family in a few words, from what its adapter says."""
    view = adapt(of_class(name))
    encoder = view if isinstance(view, Encoder) else view.encoder
    words = [f"{encoder.prefix} special token{'' if encoder.prefix == 1 else 's'}"]
    words += ["with a class token"] if encoder.has_class else ["no class token"]
    words += ["all pictures in one sequence"] if encoder.packed else []
    if isinstance(view, VisionLanguage):
        words += ["patches mixed into tokens"] if view.mixes else ["a token for each patch"]
        words += [" and ".join(view.streams())]
    return ", ".join(words)


def _names(name: str) -> tuple[str, ...]:
    """The names by which refusals call a family."""
    view = adapt(of_class(name))
    return (name,) if isinstance(view, Encoder) else (name, view.encoder.name)


def _cell(verdict: Verdict, names: tuple[str, ...], whys: dict[str, str]) -> str:
    if verdict.spec is not None:
        return "**yes**" if verdict.spec == verdict.method else f"`{verdict.spec.removeprefix(verdict.method)}`"
    template = _nameless(verdict, names)
    whys.setdefault(template, verdict.reason)
    return str(list(whys).index(template) + 1)


def _nameless(verdict: Verdict, names: tuple[str, ...]) -> str:
    """A refusal without the names of method and family."""
    pattern = "|".join(re.escape(name) for name in (verdict.method, *names))
    return re.sub(rf"\b({pattern})\b", "", verdict.reason)


def write(root: Path) -> list[Path]:
    """Renew docs/models.md and the example in docs/add-a-model.md of a checkout; the paths written."""
    table, how = root / "docs" / "models.md", root / "docs" / "add-a-model.md"
    table.write_text(page(), encoding="utf-8")
    example = f"```python\n{inspect.getsource(aimv2)}```"
    how.write_text(between(how.read_text(encoding="utf-8"), "encoder", example), encoding="utf-8")
    return [table, how]


if __name__ == "__main__":
    for path in write(Path.cwd()):
        print(path)
