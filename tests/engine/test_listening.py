"""What is heard in an encoder's blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from jeton.engine.listening import BlockListener


def test_one_call_for_all_pictures_is_heard_as_one_for_each():
    """Flash kernels are told where pictures end."""
    listener: Any = BlockListener(SimpleNamespace(encoder=SimpleNamespace(joint=True)))
    states = torch.randn(3, 1, 2, 9, 4)
    calls = listener._calls(*states, None, {"cu_seq_lens_q": torch.tensor([0, 2, 9])})
    for (*parts, mask), (begin, end) in zip(calls, ((0, 2), (2, 9)), strict=True):
        assert mask is None and all(torch.equal(part, own[:, :, begin:end]) for part, own in zip(parts, states, strict=True))
