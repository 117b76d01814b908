"""PixelWorld's question: does a model say the same when what it reads comes as pixels instead of text tokens?

Every item is asked in two modes with the same instruction: as text (`text`), and with everything but the instruction on one
rendered page (`vision`), or with only its tables and pictures on the page and the question as text (`semi`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..engine import watch
from .data import check_image
from .render import MARKER, Page, Part, Style, Table, font, render
from .score import normalise
from .subject import Subject

KINDS = {
    "choice": "Answer with the letter of the right choice only.",
    "label": "Answer with one of the named labels only.",
    "number": "Answer with a number only.",
    "text": "Answer with as few words as possible.",
    "code": "Answer with the Python function only.",
}
THINK = "Think step by step. Then write the answer on a last line that begins with 'Answer:'. "
MODES = ("text", "vision", "semi")
PROMPTS = ("base", "cot")
_SECONDS_FOR_CODE = 10


@dataclass(frozen=True)
class Item:
    """One question. `context` is what it is about, in words; `table` and `image` likewise. `choices` are lettered A, B, ...;
    `tests` is Python that raises where an answer of kind code is wrong. Any of `answers` is right."""

    task: str
    kind: str
    question: str
    answers: tuple[str, ...]
    context: str = ""
    table: Table | None = None
    image: Image.Image | None = None
    choices: tuple[str, ...] = ()
    tests: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.kind == "choice" and not self.choices:
            raise ValueError("an item of kind choice needs choices.")
        if self.kind == "code" and not self.tests:
            raise ValueError("an item of kind code needs tests.")
        if self.kind != "code" and not self.answers:
            raise ValueError("an item needs an answer.")

    @property
    def asked(self) -> str:
        """The question with its choices."""
        listed = [f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", self.choices)]
        return "\n".join([self.question, *listed])


@dataclass(frozen=True)
class Prompt:
    """What a model is given: a text and perhaps a picture; `page` where the picture was rendered, `body` what stands on it."""

    text: str
    image: Image.Image | None = None
    page: Page | None = None
    body: str = ""


@dataclass(frozen=True)
class Row:
    """One task. text, pixel: share of right answers in each mode; gap: text - pixel. similarity: mean cosine of the attention
    over words (None where no item of the task is plain text). seconds: mean time to answer an item."""

    task: str
    items: int
    text: float
    pixel: float
    gap: float
    similarity: float | None
    seconds_text: float
    seconds_pixel: float


@dataclass(frozen=True)
class Report:
    """The rows of all tasks and one over everything; left_out: items that were not asked, and why."""

    model: str
    mode: str
    prompt: str
    method: str
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    said: tuple[tuple[str, str, str], ...]  # task, answer to text, answer to pixels

    def table(self) -> str:
        """Markdown."""
        lines = ["| task | items | text | pixels | text - pixels | attention | s text | s pixels |", "|---|" + "---:|" * 7]
        for row in self.rows:
            alike = "" if row.similarity is None else f"{row.similarity:.2f}"
            lines.append(
                f"| {row.task} | {row.items} | {row.text:.3f} | {row.pixel:.3f} | {row.gap:+.3f} | {alike} | "
                f"{row.seconds_text:.2f} | {row.seconds_pixel:.2f} |"
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# -- items -------------------------------------------------------------------------------------------------------------


def embedded_items() -> list[Item]:
    """Two items, written for jeton, of each kind of task that PixelWorld takes from public sets."""
    lines = files(__package__).joinpath("pixelworld.jsonl").read_text(encoding="utf-8").splitlines()
    return [_item(json.loads(line), Path()) for line in lines if line.strip()]


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """Items of a JSONL file: task, kind, question, answer (a text or a list), and perhaps context, table (rows), image (a path
    relative to the file), choices, tests. Raises ValueError with the number of a line that cannot be used."""
    path, found = Path(path), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_item(json.loads(line), path.parent))
        except (ValueError, TypeError, KeyError) as error:
            what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path.name}, line {number}: {what}") from error
    if not found:
        raise ValueError(f"{path.name} holds no item.")
    return found


def _item(row: dict[str, Any], folder: Path) -> Item:
    answers = row.get("answer", [])
    image = None
    if "image" in row:
        check_image(folder / row["image"])
        image = Image.open(folder / row["image"]).convert("RGB")
    elif "slide" in row:
        image = render(row["slide"], Style(font_size=18)).image
    elif "figure" in row:
        image = _figure(**row["figure"])
    return Item(
        row["task"],
        row["kind"],
        row["question"],
        tuple(str(each) for each in (answers if isinstance(answers, list) else [answers])),
        row.get("context", ""),
        Table.of(row["table"]) if "table" in row else None,
        image,
        tuple(row.get("choices", ())),
        row.get("tests", ""),
    )


def _figure(size: Sequence[int], lines: Sequence[Sequence[int]], labels: Sequence[tuple[int, int, str]]) -> Image.Image:
    """A drawing of straight lines (x0, y0, x1, y1) and labels (x, y, text)."""
    image = Image.new("RGB", (size[0], size[1]), "white")
    draw = ImageDraw.Draw(image)
    for line in lines:
        draw.line(list(line), fill="black", width=2)
    for x, y, text in labels:
        draw.text((x, y), text, fill="black", font=font(15))
    return image


# -- prompts -----------------------------------------------------------------------------------------------------------


def prompted(item: Item, mode: str, prompt: str = "base", style: Style | None = None) -> Prompt:
    """An item as a model is given it in one mode."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if prompt not in PROMPTS:
        raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}.")
    order = (THINK if prompt == "cot" else "") + KINDS[item.kind]
    words = [text for text in (item.context, item.asked) if text]
    if mode == "text":
        told = [item.context, item.table.text() if item.table else "", item.asked, order]
        return Prompt("\n\n".join(text for text in told if text), item.image, body="\n\n".join(words))
    seen: list[Part] = [*([item.table] if item.table else []), *([MARKER] if item.image else [])]
    pictures = [item.image] if item.image else []
    if mode == "semi":
        if not seen:
            raise ValueError(f"{item.task} has neither a table nor a picture, so there is nothing to show; use vision.")
        page = render(seen, style, pictures)
        return Prompt("\n\n".join([*words, order]), page.image, page)
    page = render([*([item.context] if item.context else []), *seen, item.asked], style, pictures)
    return Prompt(f"The picture shows a question. {order}", page.image, page, "\n\n".join(words))


# -- right or wrong ----------------------------------------------------------------------------------------------------


def is_right(item: Item, said: str, run_code: bool = False) -> bool:
    """Whether an answer is right. After chain of thought only what follows the last 'Answer:' counts. Answers of kind code are
    run, in a process of their own with a time limit, only with `run_code`."""
    final = re.split(r"answer\s*:", said, flags=re.IGNORECASE)[-1].strip()
    if item.kind == "code":
        if not run_code:
            raise ValueError("answers of kind code are judged by running them; pass run_code=True if you trust the model.")
        return _passes(said, item.tests)
    if item.kind == "choice":
        hit = re.match(r"\W*([A-Z])\b", final)
        return (hit[1] if hit else normalise(final)) in {*item.answers, *(normalise(each) for each in item.answers)}
    if item.kind == "number":
        numbers = re.findall(r"-?\d[\d,]*\.?\d*", final)
        return bool(numbers) and any(_value(numbers[-1]) == _value(each) for each in item.answers)
    return normalise(final) in {normalise(each) for each in item.answers}


def _value(number: str) -> float:
    return float(number.replace(",", "").rstrip("."))


def _passes(said: str, tests: str) -> bool:
    fenced = re.findall(r"```(?:python)?\n(.*?)```", said, flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.py"
        file.write_text(f"{fenced[-1] if fenced else said}\n\n{tests}\n", encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(file)], cwd=folder, capture_output=True, timeout=_SECONDS_FOR_CODE, check=False
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


# -- asking ------------------------------------------------------------------------------------------------------------


class Reader:
    """A model that is shown one prompt at a time, with or without a picture."""

    def __init__(self, subject: Subject) -> None:
        self.model, self.processor = subject.model, subject.processor
        self.tokenizer = subject.processor.tokenizer

    def written(self, prompt: Prompt) -> str:
        """The prompt in the words of the model's chat template."""
        if getattr(self.processor, "chat_template", None):
            content: list[dict[str, str]] = [{"type": "image"}] if prompt.image is not None else []
            messages: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": prompt.text}]}]
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return f"USER: {'<image>' + chr(10) if prompt.image is not None else ''}{prompt.text} ASSISTANT:"

    def encode(self, prompt: Prompt) -> Any:
        text = self.written(prompt)
        more: dict[str, Any] = {} if prompt.image is None else {"images": [prompt.image]}
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):
            more["add_special_tokens"] = False
        inputs = self.processor(text=[text], return_tensors="pt", **more)
        return inputs.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answer(self, prompt: Prompt, max_new_tokens: int) -> tuple[str, float]:
        """The greedy answer, and the seconds it took."""
        inputs = self.encode(prompt)
        start = time.perf_counter()
        out = self.model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=self.tokenizer.pad_token_id
        )
        said = self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return said, time.perf_counter() - start

    @torch.inference_mode()
    def attention(self, prompt: Prompt) -> Tensor | None:
        """(words,) share of the last prompt token's attention that each word of `prompt.body` gets in the last layer, averaged
        over heads; None if it cannot be told. On a page a word gets the share of its box, each cell of the picture's grid being
        spread evenly; the processor must show the whole page."""
        inputs = self.encode(prompt)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            with watch(self.model) as run:
                row = self.model(**inputs, output_attentions=True).attentions[-1][0, :, -1].float().mean(0).cpu()
                layout = run.layout
        finally:
            self.model.set_attn_implementation(before)
        if prompt.page is None:
            return _over_words(row, self._words(prompt))
        return None if layout is None else _over_boxes(row, layout, prompt.page)

    def _words(self, prompt: Prompt) -> list[list[int]]:
        """The tokens of each word of the body."""
        text = self.written(prompt)
        bos = self.tokenizer.bos_token
        told = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not (bos and text.startswith(bos)))[
            "offset_mapping"
        ]
        words, start = [], 0
        for word in prompt.body.split():
            start = text.index(word, start)
            end = start + len(word)
            words.append([token for token, (a, b) in enumerate(told) if a < end and b > start and b > a])
            start = end
        return words


def _over_words(row: Tensor, words: list[list[int]]) -> Tensor:
    return _shares(torch.stack([row[tokens].sum() for tokens in words]))


def _over_boxes(row: Tensor, layout: Any, page: Page) -> Tensor:
    geometry, position = layout.album.geometry[0], layout.position[0].cpu()
    first = geometry.unit == 0  # the only picture, or the thumbnail, which shows the whole page
    high, wide = int(geometry.height[first][0]), int(geometry.width[first][0])
    grid = torch.zeros(high, wide)
    grid[geometry.row[first], geometry.col[first]] = row[position[: len(geometry)][first]]
    boxes = torch.tensor([word.box for word in page.words])
    scale = torch.tensor([wide / page.image.width, high / page.image.height])
    left, top, right, bottom = (boxes * scale.repeat(2)).unbind(1)
    got = (_overlap(top, bottom, high) @ grid * _overlap(left, right, wide)).sum(1)
    number = torch.tensor([word.number for word in page.words])
    return _shares(torch.zeros(int(number.max()) + 1).index_add(0, number, got))


def _overlap(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """(W, cells) how much of each cell [i, i + 1) lies between start and end (W,)."""
    here = torch.arange(cells)
    return (torch.minimum(end[:, None], here + 1) - torch.maximum(start[:, None], here)).clamp(min=0)


def _shares(value: Tensor) -> Tensor:
    return value / value.sum().clamp(min=1e-12)


def compare_modes(
    subject: Subject,
    items: Iterable[Item],
    mode: str = "vision",
    prompt: str = "base",
    style: Style | None = None,
    apply: Callable[[Any], Any] | None = None,
    max_new_tokens: int = 32,
    run_code: bool = False,
    similarity: bool = True,
) -> Report:
    """Ask every item as text and as pixels, one after the other, so that both meet the machine in the same state.

    mode: "vision" or "semi". apply: makes the run under which pixels are read, for example
    ``lambda model: jeton.apply(model, "pixelworld")``; None for the model as it is. Items of kind code are left out without
    `run_code`, in mode semi also those that have nothing to show; the report says so. similarity: compare where the last prompt
    token looks, word by word, for items of plain text (slow: attention in eager mode, without `apply`).
    """
    if mode not in MODES[1:]:
        raise ValueError(f'mode must be "vision" or "semi", got {mode!r}.')
    reader, left_out = Reader(subject), []
    told: dict[str, list[tuple[bool, bool, float, float, float | None]]] = {}
    said, method = [], "none"
    for item in items:
        reason = _unasked(item, mode, run_code)
        if reason:
            left_out.append(f"{item.task}: {reason}")
            continue
        as_text, as_pixels = prompted(item, "text", prompt), prompted(item, mode, prompt, style)
        first, seconds = reader.answer(as_text, max_new_tokens)
        if apply is None:
            second, seconds_pixel = reader.answer(as_pixels, max_new_tokens)
        else:
            with apply(reader.model) as run:
                second, seconds_pixel = reader.answer(as_pixels, max_new_tokens)
                method = run.spec
        alike = _alike(reader, item, as_text, as_pixels) if similarity else None
        right = is_right(item, first, run_code), is_right(item, second, run_code)
        told.setdefault(item.task, []).append((*right, seconds, seconds_pixel, alike))
        said.append((item.task, first, second))
    if not told:
        raise ValueError("no item could be asked: " + "; ".join(left_out or ["none was given"]))
    rows = [_row(task, results) for task, results in told.items()]
    rows.append(_row("all", [result for results in told.values() for result in results]))
    return Report(subject.name, mode, prompt, method, tuple(rows), tuple(left_out), tuple(said))


def _unasked(item: Item, mode: str, run_code: bool) -> str:
    if item.kind == "code" and not run_code:
        return "answers would have to be run (run_code=True)"
    return "nothing to show" if mode == "semi" and item.table is None and item.image is None else ""


def _alike(reader: Reader, item: Item, as_text: Prompt, as_pixels: Prompt) -> float | None:
    """Cosine of the two attentions over the words of an item without tables and pictures."""
    if item.table is not None or item.image is not None:
        return None
    found = reader.attention(as_text), reader.attention(as_pixels)
    if found[0] is None or found[1] is None:
        return None
    return float(torch.nn.functional.cosine_similarity(found[0], found[1], dim=0))


def _row(task: str, results: Sequence[tuple[bool, bool, float, float, float | None]]) -> Row:
    count = len(results)
    text, pixel, seconds, seconds_pixel = (sum(column) / count for column in list(zip(*results, strict=True))[:4])
    alike = [result[4] for result in results if result[4] is not None]
    mean = sum(alike) / len(alike) if alike else None
    return Row(task, count, text, pixel, text - pixel, mean, seconds, seconds_pixel)
