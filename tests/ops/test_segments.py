"""The cut of a video into segments, against hand-worked numbers and against every cut there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from jeton.ops.segments import best_segments, savings, seams


def links(*rows):
    return torch.tensor(rows)[None] > 0.8


def worth(cut, gain):
    return sum(int(gain[cut[i], cut[i + 1] - 1]) for i in range(len(cut) - 1))


def every_cut(frames):
    for inner in itertools.product((False, True), repeat=frames - 1):
        yield [0, *(i + 1 for i, seam in enumerate(inner) if seam), frames]


def test_the_worked_example():
    gain = savings(seams(links((0.9, 0.9, 0.9, 0.1), (0.9, 0.9, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1))))
    assert gain[0].tolist() == [[0, 3, 4, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    first, saved = best_segments(gain)
    assert first.tolist() == [[0, 0, 0, 3]] and saved.tolist() == [4]


@pytest.mark.parametrize("frames", range(1, 9))
def test_it_is_the_best_of_all_cuts(frames):
    generator = torch.Generator().manual_seed(frames)
    kept = torch.rand(40, frames - 1, 6, generator=generator) > torch.rand(40, 1, 1, generator=generator)
    gain = savings(seams(kept))
    first, saved = best_segments(gain)
    for row in range(40):
        assert int(saved[row]) == max(worth(cut, gain[row]) for cut in every_cut(frames))
        starts = sorted(set(first[row].tolist()))
        assert worth([*starts, frames], gain[row]) == int(saved[row]) and (first[row].diff() >= 0).all()
    if frames > 4:  # and a cut in the middle is not
        assert any(worth([0, frames // 2, frames], gain[row]) < int(saved[row]) for row in range(40))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_no_segment_is_longer_than_the_window(window):
    gain = savings(torch.zeros(1, 7, 5, dtype=torch.long))
    first, saved = best_segments(gain, window)
    lengths = torch.bincount(first[0])
    assert int(lengths.max()) == window and int(saved) == {1: 0, 2: 15, 3: 20}[window]


def test_ties_leave_frames_alone_and_then_prefer_short_segments():
    assert best_segments(torch.zeros(1, 3, 3))[0].tolist() == [[0, 1, 2]]
    gain = torch.zeros(1, 3, 3)
    gain[0, 0, 1] = gain[0, 1, 2] = gain[0, 0, 2] = 1
    assert best_segments(gain)[0].tolist() == [[0, 0, 2]]
    gain[0, 0, 1] = 0
    assert best_segments(gain)[0].tolist() == [[0, 1, 1]]


def test_frames_that_never_stay_change_nothing_for_those_before():
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(3, 5, 6, generator=generator) > 0.4
    longer = torch.nn.functional.pad(kept, (0, 0, 0, 3))
    first, saved = best_segments(savings(seams(kept)))
    more, same = best_segments(savings(seams(longer)))
    assert torch.equal(more[:, :6], first) and torch.equal(saved, same) and more[:, 6:].tolist() == [[6, 7, 8]] * 3
