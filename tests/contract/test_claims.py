"""What is registered is tested, and what a model cannot do is refused with a sentence, never half done."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import transformers
from cases import CASES, REFUSED, Case, each, view
from packaging.version import Version

import jeton.bridge
import tiny
import tiny_encoders
import with_timm
from jeton.engine import apply
from jeton.method import reducers
from jeton.models import Encoder, Registry, VisionLanguage
from jeton.models.timm_vit import TimmVit

LATER: dict[str, str] = {}  # classes that came after the oldest transformers jeton supports, and the version they came with
REGISTERED = sorted({**Registry.encoders, **Registry.models})


def _exists(name: str) -> bool:
    """Whether transformers has the class (the lower-level ones are not at the top of the package), jeton's bridges, or timm."""
    if name in timm_names():
        return True
    if hasattr(transformers, name) or hasattr(jeton.bridge, name):
        return True
    wanted = {view.__module__.rpartition(".")[2] for view in [*Registry.encoders.values(), *Registry.models.values()]}
    families = [
        m.name
        for m in pkgutil.iter_modules(transformers.models.__path__)
        if any(m.name.startswith(w) for w in [*wanted, "siglip", "dino"])
    ]
    for family in families:
        try:
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ModuleNotFoundError:
            continue
        if hasattr(module, name):
            return True
    return False


def timm_names() -> set[str]:
    """Classes of timm that have an adapter; none where timm is not installed."""
    return {name for name in tiny_encoders.BUILDERS if Registry.encoders[name] is TimmVit}


KNOWN = [name for name in REGISTERED if with_timm.has_timm() or Registry.encoders.get(name) is not TimmVit]


@pytest.mark.parametrize("name", KNOWN)
def test_every_registered_class_exists_in_transformers(name: str) -> None:
    if Version(transformers.__version__) < Version(LATER.get(name, "0")):
        pytest.skip(f"came with transformers {LATER[name]}")
    assert _exists(name), f"an adapter is registered for {name}, but transformers {transformers.__version__} has no such class."


@pytest.mark.parametrize("name", [name for name in KNOWN if _exists(name)])
def test_every_registered_class_has_a_tiny_model(name: str) -> None:
    assert name in tiny.BUILDERS, f"{name} has an adapter but no builder: add one to BUILDERS in tests/tiny.py."
    assert type(tiny.model(name)).__name__ == name


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_every_tiny_model_is_seen_by_an_adapter(name: str) -> None:
    assert isinstance(view(name), VisionLanguage if tiny.is_language(tiny.model(name)) else Encoder)


def test_every_method_works_somewhere() -> None:
    assert {case.method for case in CASES} == {card.id for card in reducers()}


@each(REFUSED)
def test_what_a_model_cannot_do_is_refused_naming_method_model_and_a_way_out(case: Case) -> None:
    with pytest.raises(jeton.Unsupported) as refusal:
        apply(case.net(), case.made()).remove()
    text = str(refusal.value)
    assert case.method in text and type(case.net()).__name__ in text and "use " in text


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(jeton.Unsupported, match="no adapter for BertModel"):
        apply(
            transformers.BertModel(
                transformers.BertConfig(
                    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
                )
            ),
            "random",
        )
