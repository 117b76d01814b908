"""The command line: a thin skin over the face."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__
from .method import Unsupported, methods
from .registry import find, systems

_WRONG = (ValueError, TypeError, OSError, Unsupported)  # what a user's input can cause


class _Sentences(typer.core.TyperGroup):
    """Errors are one sentence on stderr and exit code 2; JETON_TRACEBACK=1 shows where they came from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _WRONG as error:
            if os.environ.get("JETON_TRACEBACK"):
                raise
            typer.echo(f"jeton: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Sentences, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _complete(incomplete: str) -> list[tuple[str, str]]:
    """Method ids with their titles, for the last spec of a comma or | separated list."""
    start = max(incomplete.rfind(","), incomplete.rfind("|")) + 1
    head, tail = incomplete[:start], incomplete[start:].strip()
    return [(head + card.id, card.title) for card in methods() if card.id.startswith(tail)]


def _complete_one(incomplete: str) -> list[tuple[str, str]]:
    return [(card.id, card.title) for card in systems() if card.id.startswith(incomplete)]


Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Path or id of a vision-language model; default: the embedded one.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's own.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jeton {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Fewer tokens in multimodal transformers: apply a method, compare methods, see what was kept."""
    from transformers.utils import logging as hf

    heard = logging.StreamHandler()  # what jeton has to say stands under its name; libraries speak for themselves
    heard.setFormatter(logging.Formatter("jeton: %(message)s"))
    logging.getLogger("jeton").handlers[:] = [heard]
    hf.disable_progress_bar()
    hf.set_verbosity_error()


@app.command()
def compare(
    model: Model = None,
    methods_: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Names or specs, separated by commas: [cyan]tome,hired|fastv[/]; default: all.",
            autocompletion=_complete,
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Budgets: tokens ([cyan]36,14,7[/]) or shares ([cyan]0.25,0.1[/]).")
    ] = "0.25,0.1,0.05",
    data: Annotated[
        Path | None, typer.Option(help="JSONL file, one {image, question, answer} a line; default: the embedded questions.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many questions.")] = None,
    seed: Annotated[
        int, typer.Option(help="Draws the questions where --limit leaves some out; seed of methods that have one.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions in one batch.", min=1)] = 32,
    device: Device = "cpu",
    dtype: Dtype = None,
    controls: Annotated[bool, typer.Option(help="Put random, uniform, pool and downsample beside the others.")] = True,
    second_turn: Annotated[bool, typer.Option(help="Ask a second question about each picture on the cache of the first.")] = True,
    on_bad_line: Annotated[
        Literal["stop", "skip"], typer.Option(help="What to do at a line of --data that cannot be used.")
    ] = "stop",
    bridge: Annotated[
        list[Path] | None, typer.Option(help="Folder of a trained bridge, put beside the methods; may be given several times.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the rows to this JSON file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write report.html, one page that needs no other file, into this folder.")
    ] = None,
) -> None:
    """See which method keeps the most accuracy at each budget, and what it really saves.

    Without options it compares every method on the embedded model. On your own model and data:

    [cyan]jeton compare --model llava-hf/llava-1.5-7b-hf --data questions.jsonl --device cuda --keep 128,64 --out report[/]
    """
    from .measure.compare import compare as run
    from .measure.data import read_questions
    from .measure.plan import read_keep, split_specs
    from .measure.table import WIDE

    examples = None if data is None else read_questions(data, on_bad_line)
    names = None if methods_ is None else split_specs(methods_)
    result = run(
        model, examples=examples, methods=names, keep=read_keep(keep), limit=limit, seed=seed, device=device, dtype=dtype,
        batch_size=batch_size, controls=controls, second_turn=second_turn, pictures=4 if out else 0,
        bridges=bridge or (),
    )  # fmt: skip
    console = Console()
    wide = console.width if console.is_terminal else WIDE
    Console(width=wide).print(result.table(wide))
    if json_ is not None:
        json_.parent.mkdir(parents=True, exist_ok=True)
        json_.write_text(result.to_json(), encoding="utf-8")
        typer.echo(f"rows: {json_}")
    if out is not None:
        typer.echo(f"report: {result.report(out)}")


@app.command("methods")
def methods_(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    family: Annotated[str | None, typer.Option(help="Only this family: control, vit, vlm, tokenizer ...")] = None,
) -> None:
    """List every system: what it is, where it acts, and where it comes from."""
    rows = [card.row() for card in systems(family)]
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("id", "family", "stage", "year", "title", "source", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("id", "family", "stage", "year", "title", "source")))
    Console().print(table)


@app.command()
def show(id: Annotated[str, typer.Argument(help="A system's id.", autocompletion=_complete_one)]) -> None:
    """Explain one system: its idea, its fields, what it needs and where it works."""
    from .measure.systems import describe

    Console().print(escape(describe(find(id))), highlight=False)


@app.command()
def supports(
    model: Annotated[str, typer.Argument(help="A path or id (only its configuration is read), a class or a type of model.")],
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """See which methods work on a model, and why others do not, without its weights.

    [cyan]jeton supports llava-hf/llava-1.5-7b-hf[/], or [cyan]jeton supports Dinov2Model[/], [cyan]jeton supports qwen2_5_vl[/]
    """
    from .measure.support import supports as run

    found = run(model)
    typer.echo(json.dumps(found.to_dict(), indent=2) if json_ else str(found))


@app.command()
def ask(
    image: Annotated[Path, typer.Option(help="The picture.")],
    question: Annotated[str, typer.Option("--ask", help="The question.")],
    method: Annotated[
        str | None,
        typer.Option(help="A method or spec, e.g. [cyan]'divprune(keep=16)'[/]; default: all tokens.", autocompletion=_complete),
    ] = None,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.", min=1)] = 64,
    overlay: Annotated[Path | None, typer.Option(help="Write a PNG of what was kept.")] = None,
) -> None:
    """Ask one question about one picture, and see the answer, the tokens and the time.

    [cyan]jeton ask --image photo.jpg --ask "What is on the table?" --method "divprune(keep=16)" --overlay kept.png[/]
    """
    from .measure.ask import ask as run

    if overlay is not None and method is None:
        raise ValueError("--overlay shows what a method kept; name one with --method.")
    reply = run(image, question, method, model, device, dtype, max_new_tokens)
    typer.echo(reply.answer)
    typer.echo(str(reply.report), err=True)
    if overlay is not None:
        overlay.parent.mkdir(parents=True, exist_ok=True)
        reply.picture().save(overlay)
        typer.echo(f"overlay: {overlay}", err=True)


@app.command()
def train(
    system: Annotated[str | None, typer.Argument(help="The system to train; default: list the recipes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for weights and results; default: trained/SYSTEM.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
) -> None:
    """Train a system by its recipe. Needs jeton\\[train,demo].

    [cyan]jeton train m3 --out trained/m3[/]
    """
    from .recipes import names, recipe, run

    if system is None:
        for name in names():
            typer.echo(f"{name}: {(recipe(name).__doc__ or '').splitlines()[0]}")
        return
    out = out or Path("trained") / system
    typer.echo(json.dumps(run(system, out, resume), indent=2))
    typer.echo(f"written: {out}", err=True)


@app.command()
def tune(
    method: Annotated[
        str, typer.Argument(help="A method or spec, e.g. [cyan]'g-search(keep=0.25)'[/].", autocompletion=_complete_one)
    ],
    out: Annotated[Path, typer.Option(help="Write the calibration to this JSON file.")],
    model: Model = None,
    data: Annotated[
        Path | None, typer.Option(help="JSONL with image, question and answer on each line; default: the embedded questions.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many questions to calibrate on.", min=1)] = 30,
    objective: Annotated[str | None, typer.Option(help="answer or cosine; default: the method's own.")] = None,
    calls: Annotated[int | None, typer.Option(help="How many candidates to try; default: the method's own.", min=1)] = None,
    sampler: Annotated[str, typer.Option(help="auto, gp, tpe or random.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed for the questions and the search.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Calibrate a method on a model and questions, and keep the result for later.

    [cyan]jeton tune "g-search(keep=0.25)" --data questions.jsonl --out tuned.json[/], then use it as
    [cyan]"g-search(calibration='tuned.json')"[/].
    """
    from .measure.data import as_questions, read_questions, sample
    from .measure.speak import Speaker
    from .measure.subject import load_subject
    from .measure.tune import tune as run

    subject = load_subject(model, None, device, dtype)
    speaker = Speaker(subject.model, subject.processor)
    questions = sample(as_questions(subject.examples) if data is None else read_questions(data), limit, seed)
    inputs = [speaker.answered(question) for question in questions]
    tuned = run(subject.model, method, inputs, objective=objective, calls=calls, sampler=sampler, seed=seed, progress=True)
    tuned.save(out)
    typer.echo(str(tuned.calibration))
    typer.echo(f"calibration: {out}", err=True)


def main() -> None:
    """Entry point of the `jeton` command."""
    app(prog_name="jeton")
