"""Which methods are compared, and at which budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..method import Method, check_keep, get, reducers
from ..method import Sequence as Chain
from ..registry import Card

CONTROLS = ("random", "uniform", "pool", "downsample")
KEEP: tuple[int | float, ...] = (0.25, 0.1, 0.05)
# fields by which a spec says how much it keeps
_AMOUNTS = ("keep", "r", "ratio", "ratios", "dominant", "schedule", "calibration")


@dataclass(frozen=True)
class Case:
    """One row of a comparison: a method at a budget. `label` is what readers see; method None is a model as it is: the one that
    is compared ("full"), or a bridged one beside it."""

    label: str
    method: Method | None
    keep: int | float | None = None
    control: bool = False

    @property
    def spec(self) -> str:
        return self.method.spec if self.method is not None else self.label

    def drawn(self, number: int) -> Method | None:
        """The method for batch `number`. One that draws at random draws anew, so that no row rests on a single draw."""
        if self.method is None or not hasattr(self.method, "seed"):
            return self.method
        return dataclasses.replace(self.method, seed=self.method.seed + number)  # type: ignore[type-var]


FULL = Case("full", None)


def budget(keep: int | float | None) -> str:
    """A budget in words."""
    if keep is None:
        return "as given"
    return f"{100 * keep:g}%" if isinstance(keep, float) else f"{keep} tokens"


def comparable() -> list[Card]:
    """The registered methods that leave fewer visual tokens and need no training, controls first. Those that give all tokens back
    (`restores`) have no place on a scale of tokens kept; they are compared when named."""
    cards = [card for card in reducers() if card.training_free and not card.object.restores]
    return sorted(cards, key=lambda card: CONTROLS.index(card.id) if card.id in CONTROLS else len(CONTROLS))


def split_specs(text: str) -> list[str]:
    """ "a,b(x=1, y=2)|c" as ["a", "b(x=1, y=2)|c"]: commas inside brackets do not split."""
    specs, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            specs.append("")
        else:
            specs[-1] += letter
    return [spec.strip() for spec in specs if spec.strip()]


def read_keep(text: str) -> list[int | float]:
    """ "36,14" as counts, "0.25,0.1" as fractions."""
    found: list[int | float] = []
    for part in text.split(","):
        try:
            found.append(float(part) if "." in part or "e" in part.lower() else int(part))
        except ValueError:
            hint = "write counts or fractions, e.g. 64,32 or 0.25,0.1"
            raise ValueError(f"cannot read the budget {part.strip()!r}; {hint}.") from None
    return found


def check_budgets(keep: Iterable[int | float], tokens: int | None = None) -> tuple[int | float, ...]:
    """Budgets that mean something, largest first; counts above the `tokens` an image has are refused."""
    budgets = tuple(keep)
    if not budgets:
        raise ValueError("give at least one budget, e.g. keep=(0.25, 0.1).")
    for each in budgets:
        check_keep(each)
        if tokens is not None and isinstance(each, int) and each > tokens:
            raise ValueError(f"keep={each} is more than the {tokens} tokens that an image has in this model.")
    counts = {each: each * tokens if isinstance(each, float) and tokens else each for each in budgets}
    return tuple(sorted(counts, key=lambda each: counts[each], reverse=True))


def requested(names: Sequence[str | Method] | None, controls: bool = True) -> list[str | Method]:
    """What to compare: all comparable methods, or the given ones with the controls in front."""
    if names is None:
        return [card.id for card in comparable() if controls or card.id not in CONTROLS]
    front = [name for name in CONTROLS if name not in names] if controls else []
    return [*front, *names]


def plan(names: Sequence[str | Method], keep: Sequence[int | float], seed: int = 0) -> list[Case]:
    """Methods x budgets; `seed` is for methods that have one.

    A method whose spec sets its own amount, such as "divprune(keep=20)" or "tome(r=8)", is one case as it stands; any other is
    set to every budget. In a chain the last method takes the budget.
    """
    cases = []
    for name in names:
        method = get(name)
        control = method.spec.partition("(")[0] in CONTROLS
        if isinstance(name, Method) or _sets_amount(name):
            cases.append(Case(method.spec, method, None, control))
        else:
            cases += [Case(str(name), at_budget(method, each, seed), each, control) for each in keep]
    return cases


def at_budget(method: Method, keep: int | float, seed: int = 0) -> Method:
    """The same method with another budget, and with this seed where it has one that was left at its default; of a chain, the
    last one."""
    if isinstance(method, Chain):
        return Chain(*method.methods[:-1], at_budget(method.methods[-1], keep, seed))
    fields = {field.name: field.default for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    if "keep" not in fields:
        raise ValueError(f"{method.card.id} has no field keep to set a budget by; write out what it should do, in brackets.")
    changes: dict[str, int | float] = {"keep": keep}
    if "seed" in fields and getattr(method, "seed", None) == fields["seed"]:
        changes["seed"] = seed
    return dataclasses.replace(method, **changes)  # type: ignore[type-var]


def _sets_amount(spec: str) -> bool:
    """True if the last method of a spec names its own amount."""
    last = spec.rpartition("|")[2].replace(" ", "")
    return any(f"{before}{name}=" in last for before in "(," for name in _AMOUNTS)
