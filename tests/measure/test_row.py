"""A row follows from what was counted, and says when its times are rough."""

import pytest

import jeton
from jeton.measure.plan import FULL, Case
from jeton.measure.row import Row, Tally, caution


def tally(seconds, flops, right, sizes=(4, 4, 4, 4, 2), method=None):
    case = Case("x", method, 36) if method else FULL
    before, after = [144] * len(right), [36 if method else 144] * len(right)
    return Tally(case, None, [""] * len(right), right, [], before, after, flops, list(sizes), list(seconds))


@pytest.fixture
def full():
    return tally([9.0, 2.0, 4.0, 2.0, 0.1], 100.0, [True] * 8 + [False] * 2)


def test_times_are_paired_batch_by_batch_without_the_first_and_a_last_that_is_not_full(full):
    row = Row.of(tally([0.1, 1.0, 1.0, 2.0, 5.0], 40.0, [True] * 4 + [False] * 6, method=jeton.get("pool", keep=36)), full)
    assert (row.speedup, row.speedup_low, row.speedup_high) == (2.0, 1.0, 4.0)
    assert row.seconds == 1.0 and row.ideal == 2.5 and row.realised == pytest.approx(0.8)
    assert row.accuracy == 0.4 and row.retained == pytest.approx(0.5) and row.fraction == 0.25 and row.flops == 0.4


def test_a_single_batch_is_timed_as_it_is():
    one = tally([3.0], 1.0, [True], sizes=(1,))
    assert Row.of(one, one).seconds == 3.0


def test_a_full_model_that_is_never_right_retains_nothing_known(full):
    full.right = [False] * 10
    assert Row.of(full, full).retained is None


def test_rough_times_are_called_rough(full):
    row = Row.of(full, full)
    assert "varied by 100%" in caution(row, 5) and "too few batches were timed (1)" in caution(row, 2)
    steady = tally([9.0, 2.0, 2.1, 2.0, 0.1], 100.0, [True])
    assert caution(Row.of(steady, steady), 5) == ""
