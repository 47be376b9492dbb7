"""From times to rules: thresholds at shapes that were measured, few of them, and none within the noise."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.tune.gdn.rules import GAIN, MOST, At, Step, cost, deciding, fit

PLACES: list[At] = [(512, 512), (2048, 2048), (8192, 8192), (8192, 1024), (16384, 256), (16384, 64)]


def test_a_peer_that_needs_long_rows_gets_both_thresholds() -> None:
    times = {at: {"own": 1.0, "peer": 0.6 if at[0] >= 2048 and at[1] >= 1024 else 1.5} for at in PLACES}
    assert fit(times, ["own"], ["own", "peer"]) == [Step("peer", (2048, 1024)), Step("own", (0, 0))]


def test_nothing_is_said_of_shapes_smaller_than_those_measured() -> None:
    times = {at: {"own": 1.0, "peer": 0.5} for at in PLACES}
    assert fit(times, ["own"], ["own", "peer"]) == [Step("peer", (512, 64)), Step("own", (0, 0))]


def test_two_peers_share_the_shapes() -> None:
    def seconds(at: At) -> dict[str, float]:
        return {"own": 1.0, "few": 0.8 if at[0] >= 2048 else 1.2, "many": 0.5 if at[0] >= 16384 else 1.3}

    steps = fit({at: seconds(at) for at in PLACES}, ["own"], ["own", "few", "many"])
    assert steps == [Step("many", (16384, 64)), Step("few", (2048, 1024)), Step("own", (0, 0))]


def test_a_gain_within_the_noise_adds_no_rule_and_changes_no_default() -> None:
    small = math.exp(GAIN / 3)
    times: dict[At, dict[str, float]]
    times = {(rows,): {"now": 1.0, "other": 1 / small if rows == 64 else 1.0} for rows in (1, 16, 64)}
    assert fit(times, ["now", "other"], ["now", "other"]) == [Step("now", (0,))]
    times = {(rows,): {"now": 1.0, "other": 0.9} for rows in (1, 16, 64)}
    assert fit(times, ["now", "other"], ["now", "other"]) == [Step("other", (0,))]


def test_what_was_not_measured_or_is_wrong_somewhere_is_not_chosen_there() -> None:
    times: dict[At, dict[str, float]]
    times = {(1,): {"now": 1.0}, (16,): {"now": 1.0, "other": 0.5}, (64,): {"now": 1.0, "other": math.inf}}
    steps = fit(times, ["now", "other"], ["now", "other"])
    assert steps == [Step("now", (0,))], "no single threshold would do"
    del times[64,]
    assert fit(times, ["now", "other"], ["now", "other"]) == [Step("other", (16,)), Step("now", (0,))]


@given(
    st.dictionaries(
        st.tuples(st.sampled_from([1, 16, 64, 256, 512]), st.sampled_from([1, 8, 64])),
        st.fixed_dictionaries({name: st.floats(0.1, 10.0) for name in "abc"}),
        min_size=1,
        max_size=6,
    )
)
def test_rules_are_few_cover_everything_and_are_no_worse_than_any_default(
    times: dict[At, dict[str, float]],
) -> None:
    steps = fit(times, list("abc"), list("abc"))
    assert steps[-1].least == (0, 0) and len(steps) <= MOST
    assert {deciding(steps, at).candidate for at in [(0, 0), (10**6, 10**6)]} <= set("abc")
    defaults = [cost([Step(name, (0, 0))], times) for name in "abc"]
    assert cost(steps, times) <= min(defaults) + GAIN / 2 + 1e-9
    for step in steps[:-1]:
        assert any(deciding(steps, at) is step for at in times), "every rule decides somewhere"
        assert all(least in axis for least, axis in zip(step.least, zip(*times, strict=True), strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_in_one_dimension_later_rules_begin_earlier(count: int) -> None:
    """So a table may order them by their thresholds, as the kernels do."""
    times: dict[At, dict[str, float]]
    times = {(n,): {"a": 1.0 + n, "b": 3.0, "c": 9.0 - n} for n in (1, 4, 6, 8)[: 2 + count]}
    steps = fit(times, list("abc"), list("abc"))
    starts = [step.least[0] for step in steps]
    assert starts == sorted(starts, reverse=True) and len(set(starts)) == len(starts)
