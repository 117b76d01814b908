"""Where does the time go until the first token, and for each one after? Vision-language models of real shapes.

    python benchmarks/prefill.py                                             # LLaVA of Qwen2-0.5B with CLIP-L/14-336, on the CPU
    python benchmarks/prefill.py --shape llava-1.5-7b --device cuda --dtype bfloat16 --batch 1 4 8 32
    python benchmarks/prefill.py --method fastv divprune --keep 64 --batch 1 --rounds 3
    python benchmarks/prefill.py --memory --keep 64 --batch 1                # peak memory alone, which needs no rounds

Random weights from the models' configurations; nothing is downloaded. The unmodified model runs its fast attention (SDPA).
Stages: the encoder (with the signals it gives), selection (scoring and choosing, wherever it happens), prefill (the language
model over the prompt), decode (per token) and host (everything else until the first token: projector, packing, Python). The
speed-up is that of the first token: the median of the ratios of neighbouring runs of the full and the reduced model.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from common import Spread, budget, built, interleave, megabytes, milliseconds, options, peak_memory, seconds, table, write
from torch import nn

import jeton
from jeton.engine import apply, watch
from jeton.engine.run import Run
from jeton.method import Method, reducers
from jeton.models import VisionLanguage, adapt

IMAGE = 7
STAGES = ("encoder", "selection", "prefill", "host", "decode")


# -- shapes --------------------------------------------------------------------------------------------------------------


def _clip_large() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )


def _llava(text: Any) -> nn.Module:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=_clip_large(), text_config=text, image_token_id=IMAGE, image_seq_length=576)
    )


def llava_half_b() -> nn.Module:
    return _llava(
        transformers.Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        )
    )


def _llama_7b() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064
    )


def llava_7b() -> nn.Module:
    return _llava(_llama_7b())


def llava_next_7b() -> nn.Module:
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=_clip_large(), text_config=_llama_7b(), image_token_id=IMAGE, image_grid_pinpoints=pinpoints
        )
    )


def qwen_7b() -> nn.Module:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"hidden_size": 1280, "out_hidden_size": 3584, "depth": 32, "intermediate_size": 3420, "num_heads": 16}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    )


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "llava-qwen2-0.5b": llava_half_b,
    "llava-1.5-7b": llava_7b,
    "llava-next-7b": llava_next_7b,
    "qwen2.5-vl-7b": qwen_7b,
}


def prompt(net: nn.Module, batch: int, text: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One picture a prompt (672 x 672 where pictures may be larger than one crop), `text` tokens around it."""
    kind = net.config.model_type
    if kind == "qwen2_5_vl":
        grid = torch.tensor([[1, 48, 48]] * batch, device=device)
        inputs = {
            "pixel_values": torch.randn(48 * 48 * batch, 3 * 2 * 14 * 14, device=device, dtype=dtype),
            "image_grid_thw": grid,
        }
    elif kind == "llava_next":
        sizes = torch.tensor([[672, 672]] * batch, device=device)
        inputs = {"pixel_values": torch.randn(batch, 5, 3, 336, 336, device=device, dtype=dtype), "image_sizes": sizes}
    else:
        inputs = {"pixel_values": torch.randn(batch, 3, 336, 336, device=device, dtype=dtype)}
    view = adapt(net)
    assert isinstance(view, VisionLanguage)
    shown = len(view.geometry(inputs, "image")[0])
    words = torch.randint(100, 30000, (batch, text), device=device)
    front, image = words[:, : text // 2], torch.full((batch, shown), IMAGE, device=device)
    inputs["input_ids"] = torch.cat([front, image, words[:, text // 2 :]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if kind == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


# -- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method at one budget. Times in seconds (decode: per token), memory in bytes beyond the model's own."""

    shape: str
    batch: int
    method: str
    keep: int | float
    visual_before: float
    visual_after: float
    encoder_tokens: tuple[float, ...]
    layer_tokens: tuple[float, ...]
    flops_share: float
    ideal: float
    first_full: Spread
    first: Spread
    speedup: Spread
    realised: float
    selection: float
    stages_full: dict[str, Spread]
    stages: dict[str, Spread]
    memory_full: int
    memory: int


@dataclass(frozen=True)
class Peak:
    """Bytes beyond the model and its inputs that tensors take at most until the first token."""

    shape: str
    batch: int
    method: str
    keep: int | float
    memory_full: int
    memory: int


class Bench:
    """One model and one batch of prompts, measured under one method after the other."""

    def __init__(self, shape: str, net: nn.Module, inputs: dict[str, torch.Tensor], answer: int, rounds: int) -> None:
        self.shape, self.net, self.inputs, self.answer, self.rounds = shape, net, inputs, answer, rounds
        self.device = inputs["input_ids"].device
        net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0

    def generate(self, new: int) -> None:
        self.net.generate(**self.inputs, max_new_tokens=new, do_sample=False)

    def once(self, run: Run, stages: dict[str, list[float]]) -> float:
        """Seconds to the first token; what each stage took goes to `stages`, decoding measured in a longer answer."""
        first = seconds(lambda: self.generate(1), self.device)
        spent = {name: timing.median for name, timing in run.report().seconds.items()}
        named = {name: spent.get(name, 0.0) for name in ("encoder", "selection", "prefill")}
        run.reset()
        self.generate(self.answer)
        named["decode"] = run.report().seconds["decode"].median
        # what selection takes inside the encoder and the language model is counted in theirs too
        named["host"] = max(0.0, first - named["encoder"] - named["prefill"])
        for name, value in named.items():
            stages[name].append(value)
        run.reset()
        return first

    def measure(self, method: Method, keep: int | float) -> Row:
        whole_stages: dict[str, list[float]] = defaultdict(list)
        less_stages: dict[str, list[float]] = defaultdict(list)

        def full() -> float:
            with watch(self.net) as run:
                return self.once(run, whole_stages)

        def reduced() -> float:
            with apply(self.net, method) as run:
                return self.once(run, less_stages)

        whole, less = interleave(full, reduced, self.rounds)
        with apply(self.net, method) as run:
            memory = peak_memory(lambda: self.generate(1), self.device)
            report = run.report()
        speedup = Spread.of(a / b for a, b in zip(whole, less, strict=True))
        stages = {name: Spread.of(values[1:]) for name, values in less_stages.items()}  # the first was the warm-up
        return Row(
            shape=self.shape,
            batch=self.inputs["input_ids"].shape[0],
            method=method.spec,
            keep=keep,
            visual_before=sum(image.before for image in report.images) / len(report.images),
            visual_after=sum(image.after for image in report.images) / len(report.images),
            encoder_tokens=report.encoder_tokens,
            layer_tokens=report.layer_tokens,
            flops_share=report.flops_share,
            ideal=1 / report.flops_share,
            first_full=Spread.of(whole),
            first=Spread.of(less),
            speedup=speedup,
            realised=speedup.median * report.flops_share,
            selection=stages["selection"].median / Spread.of(whole).median,
            stages_full={name: Spread.of(values[1:]) for name, values in whole_stages.items()},
            stages=stages,
            memory_full=self.memory_full,
            memory=memory,
        )

    @cached_property
    def memory_full(self) -> int:
        with watch(self.net):
            self.generate(1)  # what a first call alone allocates is not its model's
            return peak_memory(lambda: self.generate(1), self.device)

    def peak(self, method: Method, keep: int | float) -> Peak:
        with apply(self.net, method):
            self.generate(1)
            memory = peak_memory(lambda: self.generate(1), self.device)
        batch = self.inputs["input_ids"].shape[0]
        return Peak(self.shape, batch, method.spec, keep, self.memory_full, memory)


# -- showing -------------------------------------------------------------------------------------------------------------


COLUMNS = (
    "method",
    "tokens",
    "FLOPs",
    "first token ms",
    *(f"{name} ms" for name in STAGES),
    "speed-up",
    "ideal",
    "realised",
    "peak MB",
)


def line(row: Row) -> list[str]:
    return [
        row.method,
        f"{row.visual_before:.0f} > {row.visual_after:.0f}",
        f"{row.flops_share:.3f}",
        milliseconds(row.first),
        *(f"{row.stages[name].median * 1e3:.2f}" for name in STAGES),
        f"{row.speedup.median:.2f} [{row.speedup.low:.2f}, {row.speedup.high:.2f}]",
        f"{row.ideal:.2f}",
        f"{row.realised:.2f}",
        megabytes(row.memory),
    ]


def peaks(title: str, rows: list[Peak]) -> None:
    full = rows[0].memory_full
    lines = [[row.method, megabytes(row.memory), f"{row.memory / full:.2f}"] for row in rows]
    table(title, ("method", "peak MB", "of the full model's"), [["full", megabytes(full), "1.00"], *lines])


def unreduced(rows: list[Row]) -> list[str]:
    """The full model's line, from the first row measured beside it."""
    row = rows[0]
    stages = [f"{row.stages_full[name].median * 1e3:.2f}" for name in STAGES]
    memory = megabytes(row.memory_full)
    return ["full", f"{row.visual_before:.0f}", "1.000", milliseconds(row.first_full), *stages, "1.00", "1.00", "1.00", memory]


def works(net: nn.Module, method: Method) -> bool:
    try:
        apply(net, method).remove()
    except jeton.Unsupported as refusal:
        print(f"left out: {refusal}")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llava-qwen2-0.5b"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--keep", nargs="+", type=budget, default=[0.5, 0.25, 0.1])
    parser.add_argument("--method", nargs="+", help="ids or specs; all if not given")
    parser.add_argument("--text", type=int, default=64, help="text tokens in a prompt")
    parser.add_argument("--memory", action="store_true", help="measure peak memory alone")
    parser.add_argument("--answer", type=int, default=9, help="tokens generated to time decoding")
    options(parser, rounds=5)
    asked = parser.parse_args()
    device, dtype = torch.device(asked.device), getattr(torch, asked.dtype)
    rows: list[Any] = []
    for shape in asked.shape:
        net = built(SHAPES[shape], device, dtype)
        names = [card.id for card in reducers() if card.training_free] if asked.method is None else asked.method
        chosen = [(method, keep) for name in names for keep in asked.keep if works(net, method := jeton.get(name, keep=keep))]
        for batch in asked.batch:
            bench = Bench(shape, net, prompt(net, batch, asked.text, device, dtype), asked.answer, asked.rounds)
            title = f"{shape}, batch {batch}, {asked.text} text tokens, {asked.dtype} on {device}"
            if asked.memory:
                here: list[Any] = [bench.peak(method, keep) for method, keep in chosen]
                peaks(title, here)
            elif here := [bench.measure(method, keep) for method, keep in chosen]:
                table(title, COLUMNS, [unreduced(here), *map(line, here)])
            rows += here
    settings = {"dtype": asked.dtype, "rounds": asked.rounds, "text": asked.text, "answer": asked.answer, "attention": "sdpa"}
    name = "prefill-memory" if asked.memory else "prefill"
    if len(asked.shape) == 1:
        name = f"{name}-{asked.shape[0]}"
    print(write(name, device, settings, rows, asked.out))


if __name__ == "__main__":
    main()
