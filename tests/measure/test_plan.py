"""What is compared: methods x budgets, with the controls in every table."""

import pytest

import jeton
from jeton.measure.plan import CONTROLS, check_budgets, plan, read_keep, requested, split_specs


def test_commas_inside_brackets_do_not_split_specs():
    assert split_specs("tome, evit(ratio=0.5, fuse=False)|fastv ,pool") == ["tome", "evit(ratio=0.5, fuse=False)|fastv", "pool"]


def test_budgets_are_counts_or_fractions():
    assert read_keep("36,0.25, 7") == [36, 0.25, 7]
    assert isinstance(read_keep("1.0")[0], float)
    with pytest.raises(ValueError, match="'many'"):
        read_keep("36,many")


def test_controls_stand_in_front_unless_left_out():
    assert requested(["divprune"]) == [*CONTROLS, "divprune"]
    assert requested(["pool", "divprune"])[-2:] == ["pool", "divprune"] and len(requested(["pool"])) == 4
    assert requested(["divprune"], controls=False) == ["divprune"]
    assert set(requested(None)) >= {*CONTROLS, "tome", "fastv"}
    assert not set(requested(None, controls=False)) & set(CONTROLS)


def test_a_name_runs_at_every_budget_and_a_spec_with_its_own_amount_once():
    cases = plan(["divprune", "tome(r=4)", "divprune(keep=9)", "tome(r=4) | fastv"], [36, 7])
    assert [(case.label, case.keep, case.spec) for case in cases] == [
        ("divprune", 36, "divprune(keep=36)"),
        ("divprune", 7, "divprune(keep=7)"),
        ("tome(r=4)", None, "tome(r=4)"),
        ("divprune(keep=9)", None, "divprune(keep=9)"),
        ("tome(r=4) | fastv", 36, "tome(r=4) | fastv(keep=36)"),
        ("tome(r=4) | fastv", 7, "tome(r=4) | fastv(keep=7)"),
    ]


def test_every_registered_method_takes_a_budget():
    for case in plan(requested(None), [0.25]):
        assert case.method.promise(144, 5).count <= 36


def test_methods_that_give_all_tokens_back_are_compared_when_named():
    assert {"tomesd", "elvit"}.isdisjoint(requested(None)) and "tomesd" in requested(["tomesd"])


def test_a_method_that_is_already_made_is_one_case():
    (case,) = plan([jeton.get("pool", keep=9)], [36, 7])
    assert case.control and case.keep is None


@pytest.mark.parametrize("keep", [[0], [-3], [1.5], [float("nan")], [], ["many"]])
def test_budgets_that_mean_nothing_are_refused(keep):
    with pytest.raises((ValueError, TypeError)):
        check_budgets(keep, 144)


def test_a_count_above_what_an_image_has_is_refused():
    with pytest.raises(ValueError, match="keep=145 is more than the 144 tokens"):
        check_budgets([145], 144)


def test_budgets_are_ordered_from_many_to_few_and_told_once():
    assert check_budgets([7, 0.25, 14, 7], 144) == (0.25, 14, 7)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean divprune"):
        plan(["divprun"], [36])


def test_the_seed_reaches_methods_that_have_one():
    cases = plan(["random", "random(seed=5)", "pool"], [36], seed=3)
    assert [case.spec for case in cases] == ["random(keep=36, seed=3)", "random(keep=36, seed=5)", "pool(keep=36)"]
