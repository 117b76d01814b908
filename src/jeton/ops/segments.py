"""Where a video stands still: the cut into segments that saves most, found exactly by dynamic programming.

Letters: F frames, P positions of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seams(links: Tensor) -> Tensor:
    """(B, F, P) how many steps up to each frame have broken a position. links (B, F - 1, P): true where a position stays from a
    frame to the next. From frame s to e it has stayed all the way where the counts at s and e are equal."""
    return torch.nn.functional.pad((~links).long().cumsum(1), (0, 0, 1, 0))


def savings(seam: Tensor) -> Tensor:
    """(B, F, F) long: tokens saved by one segment from frame s to frame e, ``(e - s)`` for each position that stays all the way;
    0 for s >= e. From `seams` (B, F, P)."""
    frames = torch.arange(seam.shape[1], device=seam.device)
    stays = torch.stack([(seam == seam[:, s : s + 1]).sum(2) for s in range(seam.shape[1])], 1)  # F^2 P, but never at once
    return stays * (frames - frames[:, None]).clamp(min=0)


def best_segments(gain: Tensor, window: int = 1024) -> tuple[Tensor, Tensor]:
    """The cut of F frames into segments of at most `window` that adds up to most: (B, F) the first frame of each frame's segment,
    and (B,) the sum. gain[b, s, e] is what a segment from s to e brings; a frame alone brings nothing.

        best(e) = max(best(e - 1), max over s < e of best(s - 1) + gain(s, e))

    Of equal choices a frame alone comes first, then the shorter segment.
    """
    assert gain.dim() == 3 and gain.shape[1] == gain.shape[2], f"gain must be (B, F, F), got {tuple(gain.shape)}"
    batch, frames, _ = gain.shape
    best = [gain.new_zeros(batch)]
    start = []
    for end in range(frames):
        low = max(0, end + 1 - window)
        alone = best[end]
        if low == end:
            best.append(alone)
            start.append(torch.full_like(alone, end, dtype=torch.long))
            continue
        value = (torch.stack(best[low:end], 1) + gain[:, low:end, end]).flip(1)
        at = value.argmax(1, keepdim=True)
        top = value.gather(1, at)[:, 0]
        start.append(torch.where(top > alone, end - 1 - at[:, 0], end))
        best.append(torch.maximum(top, alone))
    first, now = [], torch.full_like(start[-1], frames)
    for frame in reversed(range(frames)):
        now = torch.where(now > frame, start[frame], now)
        first.append(now)
    return torch.stack(first[::-1], 1), best[-1]
