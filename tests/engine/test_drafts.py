"""Candidates of assisted generation wait until the prompt has run, and come from then on."""

from __future__ import annotations

from types import SimpleNamespace

from jeton.engine.drafts import ATTRIBUTE, let_the_prompt_run_alone


class Proposing:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def get_candidates(self, ids: str) -> tuple[str, str]:
        self.asked.append(ids)
        return ids + "!", "scores"


def test_candidates_wait_once_though_the_assistant_reads_the_prompt():
    proposing = Proposing()
    model = SimpleNamespace(**{ATTRIBUTE: lambda: proposing})
    let_the_prompt_run_alone(model, lambda model, make, name: setattr(model, name, make(getattr(model, name))))
    generator = getattr(model, ATTRIBUTE)()
    assert generator.get_candidates("prompt") == ("prompt", None)
    assert generator.get_candidates("prompt a") == ("prompt a!", "scores")
    assert proposing.asked == ["prompt", "prompt a"]
