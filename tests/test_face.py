"""The face is small, complete and quick to import."""

import subprocess
import sys

import pytest

import jeton


def test_every_public_name_exists():
    assert set(jeton.__all__) >= {
        "apply",
        "compare",
        "methods",
        "tune",
        "get",
        "load_demo",
        "Tokens",
        "Reduction",
        "Budget",
        "Sequence",
        "Unsupported",
    }
    for name in jeton.__all__:
        assert getattr(jeton, name) is not None
        assert name in dir(jeton)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="tuned"):
        jeton.tuned  # noqa: B018


def test_importing_it_does_not_import_torch():
    code = "import sys, jeton; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["apply", "compare", "get", "methods", "load_demo", "tune"])
def test_what_is_public_is_documented_and_typed(name):
    thing = getattr(jeton, name)
    assert thing.__doc__ and "return" in thing.__annotations__
