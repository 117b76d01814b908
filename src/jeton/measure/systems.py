"""What the registry says, as text: one system for `jeton show`, all of them for the documents.

``python -m jeton.measure.systems`` renews docs/systems.md and the marked parts of README.md in the current folder.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from ..method import Method, methods
from ..registry import Card, systems
from .plan import CONTROLS, budget

_SITES = {
    "pixels": "on the picture itself, before the encoder",
    "block": "inside encoder blocks, of encoders alone and in vision-language models",
    "attention": "on what the queries of encoder blocks attend to",
    "encoder": "after the encoder, before the projector, of encoders alone and in vision-language models",
    "entry": "at the language model's entrance, in prefill",
    "layer": "inside the language model",
    "rule": "on how the language model's layers run",
}

_SIGNALS = {
    "ClassAttention": "the class token's attention",
    "ReceivedAttention": "the attention each token receives",
    "MeanAttention": "the attention of the mean query",
    "ClassLikeness": "the likeness of features to the class token's",
    "ClassSimilarity": "the similarity of values to the class token's",
    "AnchorAttention": "the attention each token receives from those that receive most",
    "PatchEntropy": "the entropy of each patch's grey values",
    "Keys": "attention keys",
    "Values": "attention values",
    "LastAttention": "the attention of the prompt's last token",
    "LastSimilarity": "the similarity of values to those of the prompt's last token",
    "LayerValues": "attention values of a language-model layer",
    "TextAttention": "the attention of the words that matter for the image",
    "RaterRank": "the rank of these words' attention",
    "VisualAttention": "the attention visual tokens receive from each other",
    "Given": "numbers from outside, one for each frame",
    "LayerKeys": "attention keys of a language-model layer",
    "PixelVariance": "how much the pixels of each token vary",
    "Entered": "how many tokens entered the language model",
    "Neurons": "which MLP neurons each token activates",
    "Trained": "modules of its own, trained",
    "NeuronCounts": "how many tokens activate each MLP neuron",
    "TextSimilarity": "the similarity of features to questions",
    "PageRank": "PageRank over the attention of the prompt",
    "PairedText": "the text of each image",
    "PromptNumber": "which images share a prompt",
}


def describe(card: Card) -> str:
    """One system in full: card, idea, fields, needs and places."""
    idea = [" ".join(part.split()) for part in (inspect.getdoc(card.object) or "").split("\n\n")]
    facts = [*_facts(card), "Needs no training." if card.training_free else "Needs training."]
    if card.headline:
        facts.append(f"Its authors: {card.headline}.")
    parts = [f"{card.id}: {card.title} ({card.year}, {card.source})", *idea, f"Fields:\n{_fields(card)}", "\n".join(facts)]
    return "\n\n".join(parts)


def _facts(card: Card) -> list[str]:
    if not _reduces(card):
        return [f"Import it: from {card.object.__module__} import {card.object.__name__}"]
    where = _SITES.get(card.object.site, card.object.site)
    return [f"Acts {where}.", f"Reads {'; '.join(needs(card)) or 'nothing but the tokens'}."]


def _fields(card: Card) -> str:
    if dataclasses.is_dataclass(card.object):
        fields = [field for field in dataclasses.fields(card.object) if field.init]
        lines = [f"  {field.name} = {_default(field)}  ({field.type})" for field in fields]
    else:
        # a base may have a __new__ that takes anything
        made: Any = card.object.__dict__.get("__init__", card.object) if isinstance(card.object, type) else card.object
        asked = inspect.signature(made).parameters.values()
        lines = ["  " + str(one).replace("'", "") for one in asked if one.name != "self"]
    named = re.sub(r"<function (\w+) at 0x\w+>", r"\1", "\n".join(lines))  # where a function lies differs from run to run
    return named or "  none"


def _reduces(card: Card) -> bool:
    return isinstance(card.object, type) and issubclass(card.object, Method)


def needs(card: Card) -> list[str]:
    """What the method looks at, in words, as it is by default."""
    try:
        wanted = card.object().needs().values()
    except TypeError:  # a field without default
        return ["what its fields say"]
    return list(dict.fromkeys(_SIGNALS.get(type(need).__name__, type(need).__name__) for need in wanted))


def table() -> str:
    """Every method in one Markdown table, controls first, then in the order of a token's life."""
    lines = ["| id | site | reads | source |", "|---|---|---|---|"]
    for card in _ordered():
        lines.append(f"| `{card.id}` | {card.object.site} | {'; '.join(needs(card)) or 'tokens only'} | {_source(card)} |")
    return "\n".join(lines)


def wide_table(measured: dict[str, Any] | None) -> str:
    """The same with where methods work, what their authors claim and what a comparison measured."""
    found: dict[tuple[str, float], str] = {}
    for row in [] if measured is None else measured["rows"]:
        if row["reason"] is None:
            found[re.split(r"\W", row["method"].replace("-", "_"))[0], row["keep"]] = f"{row['accuracy']:.3f}"
    lines = ["| id | acts | works on | the authors' headline | accuracy at 25 % / 10 % |", "|---|---|---|---|---|"]
    for card in _ordered():
        here = [found.get((card.id.replace("-", "_"), keep), "") for keep in (0.25, 0.1)]
        shown = " / ".join(each or "-" for each in here) if any(here) else ""
        lines.append(f"| [`{card.id}`](#{card.id}) | {card.object.site} | {works(card)} | {card.headline} | {shown} |")
    return "\n".join(lines)


def works(card: Card) -> str:
    """Where a method can be applied, as it is by default; what a model lacks is refused with a sentence."""
    method = card.object()
    kinds = {type(need).__name__ for part in method.parts() for need in part.needs().values()}
    if "Given" in kinds or card.id == "holitom":
        return "vision-language models, made for videos"
    where = "vision-language models"
    if method.site in ("pixels", "block", "attention", "encoder") and all(part.site != "layer" for part in method.parts()):
        where = "encoders and vision-language models"
    if kinds & {"ClassAttention", "ClassSimilarity"}:
        where += " with a class token"
        if any(item.name == "score" for item in dataclasses.fields(method)):
            where += ', others with score="received"'
    return where


def _ordered() -> list[Card]:
    sites = list(_SITES)
    return sorted(methods(), key=lambda card: (card.id not in CONTROLS, sites.index(card.object.site), card.year, card.id))


def _source(card: Card) -> str:
    return card.source if card.source == "control" else f"{card.title} ({card.year}), {card.source}"


def others() -> str:
    """Every other system in one Markdown table, by family."""
    cards = sorted((card for card in systems() if not _reduces(card)), key=lambda card: (card.family, card.year, card.id))
    if not cards:
        return ""
    lines = ["| id | family | where | the authors' headline | source |", "|---|---|---|---|---|"]
    for card in cards:
        where = f"{card.object.__module__}.{card.object.__name__}"
        lines.append(f"| [`{card.id}`](#{card.id}) | {card.family} | `{where}` | {card.headline} | {_source(card)} |")
    return "\n".join(lines)


def page(measured: dict[str, Any] | None = None) -> str:
    """docs/systems.md: every system with its idea and fields."""
    parts = [
        "# Systems",
        "Written by `python -m jeton.measure.systems` from the registry; do not edit.",
        "## Methods",
        _about(measured),
    ]
    parts += [wide_table(measured), "## Other systems", others()]
    for card in systems():
        lines = [
            textwrap.fill(line, 110, subsequent_indent=" " * 4 if line[:1] == " " else "") for line in describe(card).split("\n")
        ]
        parts += [f"## {card.id}", "```text\n" + "\n".join(lines) + "\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return ""
    full = measured["rows"][0]
    return (
        f"Accuracy is that of {measured['model']} on {measured['settings']['questions']} questions, {full['accuracy']:.3f} "
        "with all tokens (benchmarks/results/compare.json); the authors' headlines are theirs, on their models and data."
    )


def results(measured: dict[str, Any]) -> str:
    """Accuracy and speed-up of a comparison's JSON, a method a line, a budget a column."""
    full, *rows = [row for row in measured["rows"] if row["reason"] is None]
    budgets = list(dict.fromkeys(row["keep"] for row in rows))
    lines = [f"| method | {' | '.join(budget(keep) for keep in budgets)} |", "|---|" + "---|" * len(budgets)]
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = {row["keep"]: f"{row['accuracy']:.3f} ({row['speedup']:.2f}x)" for row in rows if row["method"] == name}
        lines.append(f"| `{name}` | {' | '.join(cells.get(keep, '') for keep in budgets)} |")
    machine, settings = measured["machine"], measured["settings"]
    what = f"Accuracy (and speed-up to the first token) of {measured['model']} on {settings['questions']} questions"
    place = ", ".join(str(machine[key]) for key in ("processor", "accelerator") if key in machine)
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    where = f"{place}, {threads}, torch {machine['torch']}, {settings['dtype']}"
    return f"{what}; with all tokens {full['accuracy']:.3f}. {where}.\n\n" + "\n".join(lines)


def between(document: str, name: str, content: str) -> str:
    """A document with the part between its markers `name: begin` and `name: end` renewed."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the document lacks the markers {begin} and {end}.")
    return f"{before}{begin}\n{content}\n{end}{after}"


def write(root: Path) -> list[Path]:
    """Renew the generated documents of a checkout; the paths written."""
    readme, systems, measured = root / "README.md", root / "docs" / "systems.md", root / "benchmarks" / "results" / "compare.json"
    example = (root / "examples" / "own_method.py").read_text(encoding="utf-8")
    text = between(readme.read_text(encoding="utf-8"), "methods", table())
    text = between(text, "example", f"```python\n{example}```")
    if measured.exists():
        text = between(text, "results", results(json.loads(measured.read_text(encoding="utf-8"))))
    readme.write_text(text, encoding="utf-8")
    found = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else None
    systems.write_text(page(found), encoding="utf-8")
    return [readme, systems]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "(must be given)" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


if __name__ == "__main__":
    for path in write(Path.cwd()):
        print(path)
