"""Text and CSV forms of actions and schedules, and what a schedule refuses to be."""

import dataclasses

import pytest

from megallm.schedule import Action, Kind, Schedule, ScheduleError, build_schedule, parse_action


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action(Kind.F, 2, 0), "2F0"),
        (Action(Kind.B, 12, 31), "12B31"),
        (Action(Kind.I, 0, 1), "0I1"),
        (Action(Kind.W, 0, 1), "0W1"),
        (Action(Kind.SEND_F, 2, 0), "2SEND_F0"),
        (Action(Kind.RECV_B, 2, 10), "2RECV_B10"),
        (Action(Kind.GRAD_SYNC, 2), "2REDUCE_GRAD"),
    ],
)
def test_action_text_reads_back(action, text):
    assert str(action) == text
    assert parse_action(f" {text} ") == action


@pytest.mark.parametrize("text", ["", "F0", "2", "2F", "2REDUCE_GRAD0", "2X0", "2F0 2F1", "-1F0", "2UNSHARD"])
def test_text_that_is_no_action_is_refused_with_itself_named(text):
    with pytest.raises(ValueError, match=r"action|kind|takes") as error:
        parse_action(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
@pytest.mark.parametrize("options", [{}, {"first_trainable_stage": 2}, {"forward_only": True}])
def test_csv_round_trip(name, options):
    schedule = build_schedule(name, 4, 1, 5, **options)
    read = Schedule.from_csv(schedule.to_csv(), name=name)
    assert read == dataclasses.replace(schedule, max_in_flight=None)


def test_csv_infers_a_placement_that_turns_back_and_skips_bubbles():
    read = Schedule.from_csv("0F0,,,3F0,3B0,,,0B0\n,1F0,2F0,,,2B0,1B0\n")
    assert read.placement == (0, 1, 1, 0)
    assert read.stages_of(1) == (1, 2)
    assert [read.crosses_ranks(stage) for stage in range(4)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no action"),
        ("0F0,0B0\n1F0,0B1\n", "stage 0 is on row 1 and on row 2"),
        ("0F0\n2F0\n", "no row has stage 1"),
        ("0F0,0SEND_F0\n", "row 1: 0SEND_F0 is not compute"),
        ("0F0\n1F0,what\n", "row 2: 'what' is not an action"),
    ],
)
def test_csv_that_is_no_schedule_is_refused_with_the_reason(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        Schedule.from_csv(text)


def test_fingerprint_is_stable_and_depends_on_everything():
    schedule = build_schedule("interleaved", 2, 2, 4)
    # A constant: another value on another machine or Python would part ranks that agree.
    assert schedule.fingerprint()[:16] == "47cc8c289959f709"
    first = schedule.actions[0]
    variants = [
        dataclasses.replace(schedule, name="other"),
        dataclasses.replace(schedule, num_micro_batches=5),
        dataclasses.replace(schedule, first_trainable_stage=1),
        dataclasses.replace(schedule, forward_only=True),
        dataclasses.replace(schedule, max_in_flight=None),
        dataclasses.replace(schedule, actions=(first[1::-1] + first[2:], schedule.actions[1])),
    ]
    assert len({variant.fingerprint() for variant in [schedule, *variants]}) == 1 + len(variants)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"placement": (0, 1, 1)}, "placement"),
        ({"placement": (0, 0)}, "placement"),
        ({"placement": (0, 2)}, "placement"),
        ({"num_micro_batches": 0}, "at least 1"),
        ({"first_trainable_stage": 2}, "first_trainable_stage"),
        ({"actions": ((),)}, "lists of actions"),
        ({"actions": ((Action(Kind.F, 1, 0),), ())}, "not on this rank"),
        ({"actions": ((Action(Kind.F, 7, 0),), ())}, "not on this rank"),
        ({"actions": ((Action(Kind.F, 0, 9),), ())}, "no such micro-batch"),
        ({"actions": ((Action(Kind.F, 0, None),), ())}, "no such micro-batch"),
        ({"actions": ((Action(Kind.SEND_F, 0, 0),), ())}, "not compute"),
    ],
)
def test_impossible_schedules_cannot_be_made(changes, sentence):
    with pytest.raises(ScheduleError, match=sentence):
        dataclasses.replace(build_schedule("1f1b", 2, 1, 2), **changes)
