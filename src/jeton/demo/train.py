"""Trains the demo model from nothing: `python -m jeton.demo.train [--out DIR] [--resume]`. Needs jeton[train].

Three stages, each with the losses described in `jeton.demo.losses`:

encoder    on crowded scenes, the encoder learns what its patches show; the class token learns what is in the scene and
           to look at it
language   the projector and language model learn to name patches and to answer, on the frozen encoder
joint      everything, with every loss of the other stages still on

Writes DIR/checkpoint (weights, processor, training.json) and DIR/scenes (the held-out questions). A finished stage
leaves its state in DIR/stages, from which --resume goes on; the folder is removed at the end.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from jeton.demo.batches import Batches
from jeton.demo.evaluate import accuracy, second_turn_accuracy
from jeton.demo.examples import Example, write_examples
from jeton.demo.losses import Batch, Teacher, losses
from jeton.demo.model import make_model, make_processor, make_tokenizer

SEED = 0


@dataclass(frozen=True)
class Stage:
    """One stage: which losses (see `losses`), for how many steps of `batch` scenes, at which peak learning rate."""

    name: str
    see: bool
    speak: bool
    steps: int
    rate: float
    batch: int


STAGES = (
    Stage("encoder", see=True, speak=False, steps=2400, rate=2.5e-3, batch=12),
    Stage("language", see=False, speak=True, steps=1700, rate=2e-3, batch=12),
    Stage("joint", see=True, speak=True, steps=1500, rate=7e-4, batch=12),
)


def _optimizer(stage: Stage, modules: list[torch.nn.Module]) -> tuple[torch.optim.Optimizer, object]:
    """AdamW with a linear warm-up over a twentieth of the stage, then a cosine to zero."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, stage.steps // 20 + 1, stage.steps)
    return optimizer, schedule


def _step(model, teacher: Teacher, batch: Batch, stage: Stage, optimizer, schedule) -> dict[str, float]:
    found = losses(model, teacher, batch, see=stage.see, speak=stage.speak)
    optimizer.zero_grad()
    sum(found.values()).backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    schedule.step()
    return {name: loss.item() for name, loss in found.items()}


def run_stage(stage: Stage, model: LlavaForConditionalGeneration, teacher: Teacher, batches: Batches) -> list[dict[str, float]]:
    """Trains one stage in place and returns the losses of every step."""
    model.train()
    optimizer, schedule = _optimizer(stage, [model, teacher])
    history: list[dict[str, float]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TimeRemainingColumn(), TextColumn("{task.fields[losses]}"))  # fmt: skip
    with Progress(*columns) as progress:
        task = progress.add_task(stage.name, total=stage.steps, losses="")
        loader = DataLoader(batches, batch_size=None, num_workers=1)  # scenes are drawn on the second core
        for _, batch in zip(range(stage.steps), loader):
            history.append(_step(model, teacher, batch, stage, optimizer, schedule))
            recent = history[-50:]
            means = {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]}
            progress.update(task, advance=1, losses="  ".join(f"{k} {v:.3f}" for k, v in means.items()))
    model.eval()
    return history


def train(
    out: Path, stages: tuple[Stage, ...] = STAGES, resume: bool = False
) -> tuple[LlavaForConditionalGeneration, ProcessorMixin, dict[str, float]]:
    """Runs the stages; returns the model, its processor and the seconds each stage took."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model, teacher, seconds = make_model(tokenizer), Teacher(tokenizer), {}
    (out / "stages").mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(stages):
        state = out / "stages" / f"{stage.name}.pt"
        if resume and state.exists():
            saved = torch.load(state, weights_only=True)
            model.load_state_dict(saved["model"])
            teacher.load_state_dict(saved["teacher"])
            seconds[stage.name] = saved["seconds"]
            continue
        start = time.perf_counter()
        joint = stage.see and stage.speak
        batches = Batches(tokenizer, stage.batch, SEED + 1 + number, crowded=not stage.speak, every_word=joint)
        run_stage(stage, model, teacher, batches)
        seconds[stage.name] = time.perf_counter() - start
        saved = {"model": model.state_dict(), "teacher": teacher.state_dict(), "seconds": seconds[stage.name]}
        torch.save(saved, state)
    return model.eval(), make_processor(tokenizer), seconds


def describe(model, processor, examples: list[Example], seconds: dict[str, float]) -> dict:
    """What training.json says: cost, accuracy, and where it was trained."""
    return {
        "seconds": {name: round(spent) for name, spent in seconds.items()},
        "accuracy": {kind: round(share, 4) for kind, share in accuracy(model, processor, examples).items()},
        "second_turn_accuracy": round(second_turn_accuracy(model, processor, examples), 4),
        "questions": len(examples),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip


def save(out: Path, model, processor, report: dict) -> None:
    """Writes the checkpoint beside the old one and then swaps them, so that a reader never finds half of one."""
    fresh, final = out / "checkpoint.new", out / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    processor.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # it is written for its owner only, and would be packaged so
    (fresh / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)


def main(
    out: Annotated[Path, typer.Option(help="Folder that gets checkpoint/ and scenes/.")] = Path(__file__).parent,
    resume: Annotated[bool, typer.Option(help="Go on after the last finished stage.")] = False,
) -> None:
    """Train the demo model on this machine's CPU."""
    torch.set_num_threads(1)  # batches are small: a second thread gains little, and loses much on a busy machine
    model, processor, seconds = train(out, resume=resume)
    report = describe(model, processor, write_examples(out / "scenes"), seconds)
    save(out, model, processor, report)
    shutil.rmtree(out / "stages")
    typer.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
