"""What a run refuses, with a sentence that says what would work."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from torch import nn

from ..learned import Learned
from ..method import Method, Unsupported
from ..models import VisionLanguage
from ..needs import (
    ClassAttention,
    ClassLikeness,
    ClassSimilarity,
    Given,
    LastAttention,
    LastSimilarity,
    Need,
    PairedText,
    TextSimilarity,
)

if TYPE_CHECKING:
    from .run import Run


def check(run: Run) -> None:
    """Refuse what the model cannot do, before anything runs."""
    view = run.view if isinstance(run.view, VisionLanguage) else None
    if run.train:
        _check_training(run)
    _check_endings(run)
    run.encoder.check(run.model)
    if view is not None:
        view.check()
    for method in run.methods:
        _check_site(run, method, view)
        for need in method.needs().values():
            _check_need(run, method, need, view)
    if view is not None:
        _check_words(run, view)
        _check_virtual(run, view)
        _check_masks(run, view)
    _check_kernels(run)


def _check_training(run: Run) -> None:
    """Only what is trained, on an encoder alone."""
    for method in run.methods:
        if not isinstance(method, Learned) or len(run.methods) > 1:
            raise ValueError(f"{run.spec} cannot be trained: train=True takes one method that learns, alone.")
    if isinstance(run.view, VisionLanguage) or run.encoder.packed:
        name = run.methods[0].card.id
        _refuse(run, run.methods[0], "is no encoder that keeps pictures apart", f"an image classifier to train {name} on")


def _check_endings(run: Run) -> None:
    """What is handed on behind the last block: tokens of a method's own, or all patches again; one of the two."""
    finishing = [method for method in run.methods if method.finishes]
    inside = [method for method in run.methods if method.site in ("block", "pixels")]
    if finishing and len(inside) > 1:
        raise Unsupported(
            f"{finishing[0].card.id} hands on tokens of its own behind the last block, so no other method can act inside the "
            f"same encoder; use it without {next(m.card.id for m in inside if m is not finishing[0])}."
        )
    layers = getattr(getattr(run.view.model, "config", None), "vision_feature_layer", None)
    if run.restore and isinstance(layers, list | tuple) and len(layers) > 1:
        raise Unsupported(
            f"{type(run.model).__name__} hands on features of several encoder blocks, but patches are restored behind the "
            f"last of them alone; leave out restore=True and methods inside the encoder."
        )
    if finishing and run.restore:
        raise Unsupported(f"{finishing[0].card.id} hands on tokens of its own, from which no patch can be restored.")


def _check_site(run: Run, method: Method, view: VisionLanguage | None) -> None:
    """A method must find the place where it acts."""
    encoder, together = run.encoder, "packs all pictures into one sequence"
    if view is None and encoder.packed:
        _refuse(run, method, together, "the whole vision-language model")
    if encoder.maps and not method.maps:
        lacks = "runs its blocks on maps of patches, some of them in windows, so patches cannot leave one by one"
        _refuse(run, method, lacks, "elvit, which leaves a smaller map and gives the whole one back")
    if method.resizes and not encoder.resizable:
        _refuse(run, method, *encoder.fixed)
    if method.site == "attention" and encoder.packed:
        _refuse(run, method, together, "an encoder that keeps pictures apart")
    if view is None:
        if method.site in ("layer", "rule"):
            _refuse(run, method, "is an encoder without a language model", "a method of the site encoder or block, e.g. tome")
        return
    leaves = method.site == "block" or (method.site == "pixels" and (method.resizes or not encoder.groups))
    restored = method.site == "block" and run.restore and not encoder.packed
    if leaves and encoder.packed and not view.mixes:
        _refuse(run, method, f"{together} in its encoder", "divprune or fastervlm(score='received')")
    if leaves and not restored and view.mixes:
        others = "divprune, fastv, or a score such as fastervlm(score='received')"
        merges = method.site == "block" and not encoder.packed
        _refuse(
            run,
            method,
            "mixes neighbouring patches into tokens behind its encoder, so they cannot leave one by one inside it",
            f"restore=True with a method that merges, which shortens the encoder alone, or {others}" if merges else others,
        )


def _check_need(run: Run, method: Method, need: Need, view: VisionLanguage | None) -> None:
    """A method must find what it reads."""
    encoder, name = run.encoder, method.card.id
    if isinstance(need, ClassAttention | ClassSimilarity | ClassLikeness) and not encoder.has_class:
        option = f'{name}(score="received")' if hasattr(method, "score") else "divprune or tome"
        reads = "the class token" if isinstance(need, ClassLikeness) else "the class token's attention"
        _refuse(run, method, f"has an encoder without a class token ({encoder.name})", option, reads)
    if isinstance(need, LastAttention | LastSimilarity) and view is None:
        _refuse(run, method, "has no language model", "an encoder method, e.g. fastervlm", "the prompt's last token")
    if isinstance(need, Given) and (view is None or "video" not in view.streams()):
        _refuse(run, method, "takes no videos", f"{name} without them", "numbers for the frames of videos")
    if isinstance(need, PairedText) and view is None:
        _refuse(run, method, "has no language model", "an encoder method, e.g. fastervlm", "the text of each image")
    if isinstance(need, TextSimilarity):
        _check_tower(run, method, need)


def _check_tower(run: Run, method: Method, need: TextSimilarity) -> None:
    """The text tower must be the companion of the encoder: one that was trained beside it has its width."""
    encoder, width, reads = run.encoder, run.encoder.dims[0], "the question through a text tower"
    if need.tower is None:
        without = f"text=jeton.ClipText(clip, tokenizer) and question=..., or {method.card.id}(text=False) to go without"
        _refuse(run, method, "came without one", without, reads)
    if need.tower.width != width or encoder.packed:
        _refuse(
            run,
            method,
            f"has an encoder of width {width} ({encoder.name}) and the tower's patches are {need.tower.width} wide",
            f"the CLIP model that this encoder was taken from, or {method.card.id}(text=False)",
            reads,
        )


def _check_words(run: Run, view: VisionLanguage) -> None:
    """What `positions` and `newlines` ask for."""
    if run.compact and view.rotary_rows > 1:
        raise Unsupported(
            f"{view.name} numbers positions by time, height and width, which are coordinates and cannot be renumbered "
            f'without gaps; use positions="keep".'
        )
    if run.newlines in ("drop", "pool") and view.marks:
        raise Unsupported(
            f"{view.name} has no newlines of its own: {view.marks} are text of the prompt, and stay; leave out "
            f'newlines={run.newlines!r}, or use newlines="keep".'
        )
    if run.compact and view.windowed:
        raise Unsupported(
            f"{view.name} has layers that see a window of so many columns, which without gaps would reach further back; "
            f'use positions="keep".'
        )


def _check_virtual(run: Run, view: VisionLanguage) -> None:
    """Merged tokens that act at all their places need layers that look back, original positions and masks of jeton's."""
    if not run.virtual:
        return
    name = next(method.card.id for method in run.methods if method.virtual)
    if view.windowed or view.masked_above:
        raise Unsupported(
            f"{name} lets merged tokens act at all their places in layers that look back, but {view.name} has layers "
            f"with windows or blocks of columns that see each other; use {name}(unmerge=False)."
        )
    if run.compact:
        raise ValueError(
            f'{name} lets merged tokens act at their original positions, which positions="compact" gives up; use '
            f'positions="keep", or {name}(unmerge=False).'
        )
    if "flash" in _attention(view.decoder):
        raise Unsupported(
            f"{name} attends with a mask of its own in the language model of {view.name}, which flash attention kernels "
            f'do not take; load the model with attn_implementation="sdpa", or use {name}(unmerge=False).'
        )


def _check_masks(run: Run, view: VisionLanguage) -> None:
    """Kernels that make masks themselves count the columns that are left."""
    if not run.methods or not (view.windowed or view.masked_above):
        return
    implementation = _attention(view.decoder)
    if "flash" in implementation or "flex" in implementation:
        raise Unsupported(
            f"{view.name} has layers with windows or blocks of columns that see each other, which the kernels of "
            f"{implementation} count by the columns that are left; load the model with attn_implementation="
            f'"{"sdpa" if getattr(view.decoder, "_supports_sdpa", False) else "eager"}".'
        )


def _check_kernels(run: Run) -> None:
    """What the encoder's attention kernels cannot be told."""
    if "flash" not in _attention(run.encoder.model):
        return
    masking = next((method for method in run.methods if method.site == "attention"), None)
    if masking is not None:
        raise Unsupported(
            f"{masking.card.id} says which keys each query attends to, which flash attention kernels do not take; load the "
            'model with attn_implementation="sdpa".'
        )
    if any(method.site == "block" and method.proportional for method in run.methods):
        raise Unsupported(
            "proportional attention adds log(size) to the attention logits, which flash attention kernels do not take; load "
            'the model with attn_implementation="sdpa" or set proportional=False.'
        )


def _attention(module: nn.Module) -> str:
    """The attention implementation a model names; "" where it names none."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or ""


def _refuse(run: Run, method: Method, lacks: str, instead: str, reads: str = "") -> NoReturn:
    reading = f" reads {reads}, but" if reads else " cannot be applied:"
    raise Unsupported(f"{method.card.id}{reading} {type(run.model).__name__} {lacks}; use {instead}.")
