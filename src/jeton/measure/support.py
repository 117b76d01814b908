"""Which methods work on a model: each is really applied to the model's class, without weights, and what refuses says why.

In a checkout ``python -m jeton.measure.support`` renews docs/models.md, families by methods, and the example in
docs/add-a-model.md. It needs timm.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..engine import apply
from ..method import Unsupported, find, methods
from ..models import Encoder, Registry, VisionLanguage, adapt, aimv2
from .blank import blank, of_class
from .systems import between


@dataclass(frozen=True)
class Verdict:
    """One method on one model. spec: what to apply: the method's id, or the id with fields that the refusal of the id alone named
    and that turned out to work; None where nothing does. reason: the refusal, "" where there was none. how: what `apply` must be
    told beside the spec, such as train=True where a method works once it is trained."""

    method: str
    spec: str | None
    reason: str
    how: str = ""

    @property
    def works(self) -> bool:
        return self.spec is not None

    @property
    def shown(self) -> str:
        return (self.spec or "") + (f" with {self.how}" if self.how else "")


@dataclass(frozen=True)
class Support:
    """What `supports` found for a model."""

    model: str
    verdicts: tuple[Verdict, ...]

    @property
    def works(self) -> tuple[str, ...]:
        """The specs that work, some with an argument of `apply` beside them (see `Verdict.how`)."""
        return tuple(verdict.spec for verdict in self.verdicts if verdict.spec is not None)

    @property
    def refused(self) -> dict[str, str]:
        """The methods that do not work, with the sentence that says why."""
        return {verdict.method: verdict.reason for verdict in self.verdicts if not verdict.works}

    def to_dict(self) -> dict[str, Any]:
        rows = [{"method": v.method, "works": v.works, "spec": v.spec, "how": v.how, "reason": v.reason} for v in self.verdicts]
        return {"model": self.model, "methods": rows}

    def __str__(self) -> str:
        """What works, then each reason once, as the first method it holds for has it."""
        lines = [
            f"{self.model}: {len(self.works)} of {len(self.verdicts)} methods work",
            *_wrapped("", [one.shown for one in self.verdicts if one.works]),
        ]
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
    return _search(net, method, {}, {})


def _search(net: nn.Module, method: str, fields: dict[str, str], how: dict[str, str]) -> Verdict:
    """Apply a method with these fields and arguments of `apply`; if refused, with those as well that the refusal names."""
    spec = f"{method}({', '.join(f'{name}={value}' for name, value in fields.items())})" if fields else method
    reason = _refusal(net, spec, **dict.fromkeys(how, True))
    if not reason:
        return Verdict(method, spec, "", ", ".join(f"{name}={value}" for name, value in how.items()))
    last = reason
    for name, value, own in _named(reason, method):
        if name in fields or name in how or len(fields) + len(how) == 2:
            continue
        found = _search(net, method, *(({**fields, name: value}, how) if own is not None else (fields, {**how, name: value})))
        if found.works:
            return replace(found, reason=reason)
        last = found.reason if own else last
    return Verdict(method, None, last)


def _named(reason: str, method: str) -> list[tuple[str, str, bool | None]]:
    """The settings that a refusal names, as (name, value, own). own: a field of the method, True where the refusal names the
    method with it; None: an argument of `apply`."""
    option = r"\b(\w+)=(True|False|'\w+'|\"\w+\")"
    fields = {field.name for field in dataclasses.fields(find(method).object)}
    switches = {name for name, parameter in inspect.signature(apply).parameters.items() if parameter.default is False}
    own = [pair for spec in re.findall(rf"\b{re.escape(method)}\([^()]+\)", reason) for pair in re.findall(option, spec)]
    told: list[tuple[str, str, bool | None]] = [(name, value, True) for name, value in own]
    for name, value in re.findall(option, reason):
        if name in fields and (name, value) not in own:
            told.append((name, value, False))
        elif name in switches and value == "True":
            told.append((name, value, None))
    return told


def _refusal(net: nn.Module, spec: str, **how: Any) -> str:
    """Why a spec cannot be applied; "" if it can."""
    try:
        apply(net, spec, **how).remove()
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
        alike = tuple(verdict.shown or _nameless(verdict, _names(name)) for verdict in support.verdicts)
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
            "**yes**; yes with the (fields) and the arguments of `jeton.apply` that are shown, `train=True` where a method works "
            "once it is trained; or the number of the reason why not.",
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
    words += ["blocks on maps, in windows"] if encoder.maps else []
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
        more = " ".join(part for part in (verdict.spec.removeprefix(verdict.method), verdict.how) if part)
        return f"`{more}`" if more else "**yes**"
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
