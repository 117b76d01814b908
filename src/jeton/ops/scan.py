"""Selective scans of state-space models, in chunks: the recurrence runs over about 2 sqrt(N) steps instead of N.

Letters: B rows, N tokens in the order of the scan, D channels, S states of a channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def selective_scan(
    x: Tensor, time: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, idle: Tensor | None = None
) -> Tensor:
    """Mamba's scan of x (B, N, D) to y (B, N, D), in float32 and returned in x's dtype:

        h_t = exp(time_t a) h_{t-1} + time_t b_t x_t        y_t = c_t h_t + d x_t

    time (B, N, D) is the step size of each token, positive; a (D, S) negative; b and c (B, N, S); d (D,). `idle` (B, N, D) is
    time that passes in front of each token without any input, during which states only decay: exp((time + idle) a), while the
    token's own input still weighs `time`. A token with others missing in front of it so finds the states as these would have
    left them had they been zero.
    """
    time = time.float()
    decay = (time if idle is None else time + idle.float())[..., None] * a.float()
    drive = (time * x.float())[..., None] * b.float()[:, :, None]
    states = linear_scan(decay, drive)
    y = (states @ c.float()[..., None])[..., 0]
    return (y if d is None else y + d.float() * x.float()).to(x.dtype)


def linear_scan(decay: Tensor, drive: Tensor, chunk: int | None = None) -> Tensor:
    """h_t = exp(decay_t) h_{t-1} + drive_t along dim 1 of two tensors (B, N, ...), from h = 0; decay <= 0.

    All chunks of about sqrt(N) tokens run at once, each from zero; then what each hands to the next is carried through. Nothing
    is divided by a decay, so long ones underflow to 0 and do no harm. The gradient is a scan from the other end.
    """
    states: Tensor = _Scan.apply(decay, drive, chunk or max(1, math.ceil(math.sqrt(drive.shape[1]))))
    return states


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, chunk: int) -> Tensor:
        step = decay.exp()
        states = _run(step, drive, chunk)
        ctx.save_for_backward(step, states)
        ctx.chunk = chunk
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        step, states = ctx.saved_tensors
        # what reaches h_t: its own gradient, and that of h_{t+1} by the factor from one to the other
        back = torch.cat([torch.zeros_like(step[:, :1]), step.flip(1)[:, :-1]], 1)
        drive = _run(back, grad.flip(1), ctx.chunk).flip(1)
        decay = drive * step
        decay[:, 0] = 0
        decay[:, 1:] *= states[:, :-1]
        return decay, drive, None


def _run(step: Tensor, drive: Tensor, chunk: int) -> Tensor:
    """h_t = step_t h_{t-1} + drive_t along dim 1."""
    n = drive.shape[1]
    short = -n % chunk
    if short:
        rest = (0, 0) * (drive.dim() - 2) + (0, short)
        step, drive = (torch.nn.functional.pad(part, rest) for part in (step, drive))
    step, drive = (part.unflatten(1, (-1, chunk)) for part in (step, drive))
    states, since = torch.empty_like(drive), torch.empty_like(step)  # since: the product from the beginning of the chunk
    states[:, :, 0], since[:, :, 0] = drive[:, :, 0], step[:, :, 0]
    for at in range(1, chunk):
        torch.addcmul(drive[:, :, at], step[:, :, at], states[:, :, at - 1], out=states[:, :, at])
        torch.mul(step[:, :, at], since[:, :, at - 1], out=since[:, :, at])
    for at in range(1, states.shape[1]):
        states[:, at].addcmul_(since[:, at], states[:, at - 1, -1:])
    return states.flatten(1, 2)[:, :n]
