"""The machine a number was measured on, in words that identify no person and no host."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers

from .. import __version__


def describe(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Processor, cores, threads, accelerator and versions."""
    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    device = torch.device(device)
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts | {"jeton": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
