"""Every example runs as it stands."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_is_short(path, tmp_path):
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, str(path)]
    if "jeton[timm" in path.read_text():
        ready = f"import runpy, sys; sys.path.append({str(Path(__file__).parent)!r}); import with_timm; with_timm.timm()"
        command = [sys.executable, "-c", f"{ready}; runpy.run_path({str(path)!r})"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
