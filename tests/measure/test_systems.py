"""Documents that are generated from the registry are up to date."""

from pathlib import Path

import pytest

import jeton
from jeton.measure.systems import between, describe, others, page, results, table, write

ROOT = Path(__file__).parents[2]


def test_the_documents_are_up_to_date(tmp_path):
    for name in ("README.md", "docs/systems.md", "examples/own_method.py", "benchmarks/results/compare.json"):
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for written in write(tmp_path):
        assert written.read_text() == (ROOT / written.relative_to(tmp_path)).read_text(), "run python -m jeton.measure.systems"


def test_every_system_is_listed_and_explained():
    for card in jeton.systems():
        assert f"| `{card.id}` |" in table() or f"[`{card.id}`]" in others()
        assert f"[`{card.id}`](#{card.id})" in page()
        assert f"## {card.id}\n" in page() and card.source in page()


def test_a_description_tells_fields_needs_and_place():
    text = describe(next(card for card in jeton.methods() if card.id == "fastv"))
    assert "layer = 2  (int)" in text and "Acts inside the language model." in text
    assert "Reads the attention of the prompt's last token." in text and "Needs no training." in text


def test_markers_are_needed():
    assert between("a<!-- x: begin -->old<!-- x: end -->b", "x", "new") == "a<!-- x: begin -->\nnew\n<!-- x: end -->b"
    with pytest.raises(ValueError, match="markers"):
        between("nothing", "x", "new")


def test_results_are_a_table_of_methods_and_budgets(made):
    text = results(made.to_dict())
    assert "| method | 36 tokens | 14 tokens | 7 tokens |" in text
    assert "| `divprune` | 0.784 (1.90x) |" in text and "with all tokens 0.970" in text
