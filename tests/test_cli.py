"""The command line: what it prints, what it writes, and how it fails."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import jeton
from jeton.cli import app

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    jeton.load_demo().examples[0].image.save(path)
    return path


@pytest.mark.parametrize("command", [(), ("compare",), ("methods",), ("show",), ("ask",), ("tune",)])
def test_help_reads_well(command):
    result = run(*command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output and "[cyan]" not in result.output


def test_the_version_is_told():
    assert run("--version").output.strip() == f"jeton {jeton.__version__}"


def test_methods_lists_every_method_as_json():
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["id"] for row in rows] == [card.id for card in jeton.methods()]
    assert all(set(row) == {"id", "family", "stage", "title", "year", "source", "training_free"} for row in rows)


def test_methods_of_one_family_as_a_table():
    result = run("methods", "--family", "control")
    assert result.exit_code == 0 and "downsample" in result.stdout and "divprune" not in result.stdout


def test_show_explains_a_method():
    result = run("show", "evit")
    assert result.exit_code == 0 and "ratio = 0.7" in result.stdout and "inside encoder blocks" in result.stdout


def test_ask_answers_counts_and_draws(photo, tmp_path):
    out = tmp_path / "new" / "kept.png"
    result = run(
        "ask", "--image", photo, "--ask", "How many digits are there?", "--method", "divprune(keep=16)", "--overlay", out
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() and "16" in result.stderr and "FLOPs" in result.stderr
    assert Image.open(out).size == (448, 448)


def test_ask_without_a_method_uses_all_tokens(photo):
    result = run("ask", "--image", photo, "--ask", "How many digits are there?")
    assert result.exit_code == 0 and "144" in result.stderr


def test_compare_prints_a_table_and_writes_json_and_report(tmp_path):
    rows, out = tmp_path / "deep" / "rows.json", tmp_path / "report"
    options = (
        "--methods",
        "divprune,tome(r=4)",
        "--keep",
        "36",
        "--limit",
        "4",
        "--batch-size",
        "4",
        "--json",
        rows,
        "--out",
        out,
    )
    result = run("compare", *options)
    assert result.exit_code == 0, result.output
    assert "divprune" in result.stdout and "downsample" in result.stdout
    methods = [row["method"] for row in json.loads(rows.read_text())["rows"]]
    assert methods == ["full", "random", "uniform", "pool", "downsample", "divprune", "tome(r=4)"]
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")


def test_compare_reads_a_data_file_and_skips_bad_lines_if_asked(photo):
    data = photo.parent / "data.jsonl"
    good = json.dumps({"image": photo.name, "question": "How many digits are there?", "answer": "five"})
    data.write_text(f"{good}\nnonsense\n{good}\n")
    options = ("--data", data, "--methods", "pool", "--keep", "36", "--no-controls")
    stopped = run("compare", *options)
    assert stopped.exit_code == 2 and "data.jsonl, line 2" in stopped.stderr
    result = run("compare", *options, "--on-bad-line", "skip")
    assert result.exit_code == 0 and "2 questions" in result.stdout


WRONG = {
    "unknown method": (("show", "divprun"), "Did you mean divprune"),
    "unknown method in compare": (("compare", "--methods", "tomee"), "Did you mean tome"),
    "misspelt field": (("compare", "--methods", "tome(rr=3)"), "Did you mean r?"),
    "unreadable spec": (("compare", "--methods", "tome(3"), "cannot read the spec"),
    "keep of nothing": (("compare", "--keep", "0"), "keeps nothing"),
    "negative keep": (("compare", "--keep=-4"), "keeps nothing"),
    "fraction above one": (("compare", "--keep", "1.5"), "not a fraction"),
    "keep above the image": (("compare", "--keep", "145", "--limit", "2"), "more than the 144 tokens"),
    "words for keep": (("compare", "--keep", "few"), "cannot read the budget"),
    "no such model": (("compare", "--model", "./nowhere"), "cannot load a vision-language model"),
    "no such data": (("compare", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    "no such image": (("ask", "--image", "nowhere.png", "--ask", "What?"), "there is no image nowhere.png"),
    "overlay of nothing": (("ask", "--image", "a.png", "--ask", "What?", "--overlay", "b.png"), "--method"),
    "nothing to tune": (("tune", "tome", "--limit", "1", "--out", "x.json"), "methods that have: "),
    "no such objective": (("tune", "g-search", "--objective", "best", "--out", "x.json"), "no objective 'best'"),
    "no such calibration": (("compare", "--methods", "g-search(calibration='none.json')"), "no calibration file none.json"),
    "no such dtype": (("compare", "--dtype", "float7"), "there is no dtype"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.startswith("jeton: ") and "Traceback" not in result.output


def test_a_corrupt_image_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG nothing more")
    result = run("ask", "--image", path, "--ask", "What?")
    assert result.exit_code == 2 and "corrupt" in result.stderr


def test_tune_writes_a_calibration_that_a_spec_can_name(tmp_path):
    out = tmp_path / "new" / "tuned.json"
    result = run("tune", "g-search(keep=0.4)", "--limit", 2, "--calls", 4, "--sampler", "random", "--out", out)
    assert result.exit_code == 0, result.output
    assert "answer 0." in result.stdout and "2 inputs" in result.stdout
    made = jeton.get(f"g-search(calibration={str(out)!r})")
    assert made.keep == 0.4 and made.calibration.data == 2 and jeton.get(made.spec) == made


def test_completion_offers_ids_also_inside_lists_and_chains():
    from jeton.cli import _complete

    assert ("tome", jeton.methods()[[c.id for c in jeton.methods()].index("tome")].title) in _complete("to")
    assert [name for name, _ in _complete("tome,fastv|div")] == ["tome,fastv|divprune"]
