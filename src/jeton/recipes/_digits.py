"""What recipes share that train on the digits (`jeton.demo.digits`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..measure.machine import describe


def write(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Put what was measured, and on what machine, beside the weights."""
    results = {**results, "machine": describe()}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results
