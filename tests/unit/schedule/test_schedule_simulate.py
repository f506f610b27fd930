"""The simulator against closed formulas, an independent model's figures, and times worked out by hand."""

import json
from itertools import pairwise

import pytest

from megallm.schedule import (
    Action,
    Costs,
    Event,
    Kind,
    Timeline,
    build_schedule,
    lower,
    measured_costs,
    parse_action,
    simulate,
)


def timed(name, num_ranks, num_virtual, num_micro_batches, **costs):
    return simulate(lower(build_schedule(name, num_ranks, num_virtual, num_micro_batches)), Costs(**costs))


@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches", "message", "percent"),
    [
        (4, 8, 0.0, {("gpipe", 1): 27.3, ("1f1b", 1): 27.3, ("interleaved", 2): 15.8, ("interleaved", 4): 8.6}),
        (4, 8, 0.1, {("gpipe", 1): 31.4, ("1f1b", 1): 30.8, ("interleaved", 2): 19.7, ("interleaved", 4): 17.9}),
        (4, 16, 0.0, {("gpipe", 1): 15.8, ("1f1b", 1): 15.8, ("interleaved", 2): 8.6, ("interleaved", 4): 4.5}),
        (8, 32, 0.0, {("gpipe", 1): 17.9, ("1f1b", 1): 17.9, ("interleaved", 2): 9.9, ("interleaved", 4): 5.2}),
        (8, 32, 0.1, {("gpipe", 1): 23.0, ("1f1b", 1): 22.6, ("interleaved", 2): 12.3, ("interleaved", 4): 10.7}),
    ],
)
def test_bubbles_of_an_independent_simulator(num_ranks, num_micro_batches, message, percent):
    for (name, num_virtual), expected in percent.items():
        timeline = timed(name, num_ranks, num_virtual, num_micro_batches, message=message)
        assert round(100 * timeline.bubble, 1) == expected, (name, num_virtual)


@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches", "peaks"),
    [
        (4, 16, {("gpipe", 1): 16, ("1f1b", 1): 4, ("interleaved", 2): 5.5, ("interleaved", 4): 4.75}),
        (8, 32, {("gpipe", 1): 32, ("1f1b", 1): 8, ("interleaved", 2): 11.5, ("interleaved", 4): 9.75}),
    ],
)
def test_peaks_in_full_rank_micro_batches(num_ranks, num_micro_batches, peaks):
    for (name, num_virtual), expected in peaks.items():
        peak = max(timed(name, num_ranks, num_virtual, num_micro_batches).peak_in_flight)
        assert peak / num_virtual == expected, (name, num_virtual)


@pytest.mark.parametrize(
    ("name", "num_virtual", "messages"),
    [("gpipe", 1, 448), ("1f1b", 1, 448), ("interleaved", 2, 960), ("interleaved", 4, 1984)],
)
def test_messages_per_step(name, num_virtual, messages):
    assert timed(name, 8, num_virtual, 32).num_messages == messages


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_bubble_formula(num_ranks, rounds):
    """(p-1) / (v*m + p-1) where p divides m."""
    num_micro_batches = num_ranks * rounds
    for name, num_virtual in [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)]:
        expected = (num_ranks - 1) / (num_virtual * num_micro_batches + num_ranks - 1)
        assert timed(name, num_ranks, num_virtual, num_micro_batches).bubble == pytest.approx(expected, abs=1e-12)


def test_two_ranks_by_hand():
    """F0 0-1, its message 1-1.5, then the second rank; the gradient comes back at 5 and the last backward ends at 8."""
    timeline = timed("1f1b", 2, 1, 1, forward=1.0, backward=[3.0, 2.0], message=0.5)
    assert {str(event.action): (event.rank, event.start, event.end) for event in timeline.events} == {
        "0F0": (0, 0.0, 1.0),
        "0SEND_F0": (0, 1.0, 1.5),
        "1F0": (1, 1.5, 2.5),
        "1B0": (1, 2.5, 4.5),
        "1SEND_B0": (1, 4.5, 5.0),
        "0B0": (0, 5.0, 8.0),
    }
    assert timeline.makespan == 8.0
    assert timeline.rank_bubbles == pytest.approx((1 - 4 / 8, 1 - 3 / 8))
    assert timeline.bubble == pytest.approx(1 - 7 / 16)


def test_a_channel_takes_one_message_at_a_time():
    """Between two ranks each channel carries activations of both chunks and gradients."""
    timeline = timed("interleaved", 2, 2, 6, message=1.5)
    for rank in range(2):
        sends = sorted((event.start, event.end) for event in timeline.events if event.rank == rank and is_send(event))
        assert len(sends) == 18
        assert all(before[1] <= after[0] for before, after in pairwise(sends))
        assert any(before[1] == after[0] for before, after in pairwise(sends)), "one had to wait"


def is_send(event: Event) -> bool:
    return event.action.kind in (Kind.SEND_F, Kind.SEND_B)


def test_costs_per_stage_must_fit_the_stages():
    with pytest.raises(ValueError, match="3 forward costs are given for 4 stages"):
        timed("1f1b", 4, 1, 4, forward=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="not negative"):
        timed("1f1b", 4, 1, 4, backward=-1.0)


def test_measured_costs_reproduce_the_timeline_they_came_from():
    lowered = lower(build_schedule("interleaved", 2, 2, 4))
    measured = simulate(lowered, Costs(forward=[1.0, 2.0, 3.0, 4.0], backward=[2.0, 5.0, 7.0, 9.0]))
    costs = measured_costs(measured, 4)
    assert costs.forward == [1.0, 2.0, 3.0, 4.0]
    assert simulate(lowered, costs).events == measured.events
    with pytest.raises(ValueError, match="no forward of stage 4"):
        measured_costs(measured, 5)
    with pytest.raises(ValueError, match="has 2F0, but the schedule has 2 stages"):
        measured_costs(measured, 2)


def test_timelines_of_ranks_join_as_json_lines():
    timeline = timed("1f1b", 2, 1, 3, message=0.25)
    parts = [Timeline("part", tuple(event for event in timeline.events if event.rank == rank)) for rank in range(2)]
    joined = Timeline.from_json("".join(part.to_json() for part in parts), name="1f1b", unit="")
    assert sorted(joined.events, key=str) == sorted(timeline.events, key=str)
    assert (joined.makespan, joined.bubble, joined.peak_in_flight) == (
        timeline.makespan,
        timeline.bubble,
        timeline.peak_in_flight,
    )
    assert json.loads(timeline.to_json().splitlines()[0]) == {"rank": 0, "action": "0F0", "start": 0.0, "end": 1.0}


def test_a_measured_timeline_need_not_start_at_zero():
    events = (Event(0, parse_action("0F0"), 100.0, 101.0), Event(0, parse_action("0B0"), 102.0, 104.0))
    timeline = Timeline("measured", events, "s")
    assert timeline.makespan == 4.0
    assert timeline.bubble == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no compute action"),
        ('{"rank": 0, "action": "0F0", "start": 1, "end": 0}\n', "line 1: rank 0 from 1.0 to 0.0 is impossible"),
        ('{"rank": 0, "action": "0F0", "start": 1}\n', "line 1 is not an event"),
        ("\nnothing\n", "line 2 is not an event"),
        ("[1]\n", "line 1 is not an event"),
        ('{"rank": 0, "action": 5, "start": 1, "end": 2}\n', "line 1 is not an event"),
    ],
)
def test_json_that_is_no_timeline_is_refused_with_its_line(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        Timeline.from_json(text)


def test_frozen_and_evaluation_forwards_are_not_in_flight():
    assert simulate(lower(build_schedule("1f1b", 3, 1, 6, forward_only=True))).peak_in_flight == (0, 0, 0)
    assert simulate(lower(build_schedule("1f1b", 3, 1, 6, first_trainable_stage=1))).peak_in_flight == (0, 2, 1)
    assert Action(Kind.F, 0, 0) in {event.action for event in timed("1f1b", 1, 1, 1).compute}
