"""The report is one page that needs nothing else, and tells of every method."""

import re
import xml.dom.minidom
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from jeton.measure.plot import _GAP, _apart, accuracy_plot
from jeton.measure.report import render, verdict


class Addresses(HTMLParser):
    """Collects what a page would load, and whether its elements are closed."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]


@pytest.fixture
def page(made):
    return render(made)


def test_nothing_is_loaded_from_elsewhere(page):
    seen = Addresses()
    seen.feed(page)
    assert all(address.startswith(("data:image/", "#")) for address in seen.loads)
    assert not {"link", "iframe", "object", "base"} & set(seen.tags)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttp", page)
    rest = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http://" not in rest and "https://" not in rest


def test_every_method_is_in_the_plot_the_table_and_the_pictures(page, made):
    plot, table = page[page.index("<svg") : page.index("</svg>")], page[page.index("<table") : page.index("</table>")]
    for name in {row.method for row in made.rows if row.reason is None} - {"full"}:
        assert f">{name}</" in plot
        assert len(re.findall(rf">{name}</td>", table)) == 3
        assert f"<b>{name}</b>" in page


def test_a_refused_method_is_named_with_its_reason_and_text_is_escaped(page):
    assert "<b>evit (36 tokens)</b>: evit reads the class token" in page and "&lt;Model&gt; has none" in page
    assert "What &lt;colour&gt;?" in page and "<colour>" not in page


def test_right_and_wrong_answers_are_marked(page):
    assert '<span class="right">\N{CHECK MARK} red</span>' in page and '<span class="wrong">\N{BALLOT X} blue</span>' in page


def test_rows_carry_the_numbers_they_are_sorted_by(page, made):
    row = made.rows[1]
    assert f'data-key="{row.accuracy}"' in page and f'data-key="{row.speedup}"' in page


def test_the_plot_is_one_well_formed_svg(made):
    for against in ("tokens", "flops"):
        drawing = xml.dom.minidom.parseString(accuracy_plot(made.rows, against))
        assert drawing.documentElement.tagName == "svg"
    assert accuracy_plot(made.rows) == accuracy_plot(made.rows), "the same rows give the same file"


def test_labels_never_overlap():
    placed = _apart([0.5, 0.5, 0.5, 0.51, 0.9])
    assert all(b - a >= _GAP - 1e-9 for a, b in pairwise(placed))
    assert placed[-1] == 0.9


def test_the_verdict_names_the_best_method_and_the_best_control(made):
    sentences = verdict([row for row in made.rows if row.reason is None])
    assert sentences[0].startswith("At 36 tokens: random is ahead with 0.844, 87% of full, for 50% of the FLOPs")
    assert len(sentences) == 3


def test_it_is_written_with_its_numbers_beside(made, tmp_path):
    path = made.report(tmp_path / "deep" / "down")
    assert path.name == "report.html" and path.read_text(encoding="utf-8") == render(made)
    assert (path.parent / "compare.json").read_text() == made.to_json()


def test_a_comparison_that_was_run_makes_a_page(ran):
    page = render(ran)
    assert page.count("<img") == 8 and "tome(keep=72) | fastv" in page
