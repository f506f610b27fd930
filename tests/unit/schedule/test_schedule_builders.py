"""Builders and lowering: known orders, budgets that are reached, and the whole grid verified."""

import pytest

from megallm.schedule import Kind, build_schedule, lower, simulate, verify


def texts(actions):
    return " ".join(map(str, actions))


def test_one_f_one_b_order():
    schedule = build_schedule("1f1b", 3, 1, 4)
    assert texts(schedule.actions[0]) == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"
    assert texts(schedule.actions[2]) == "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"


def test_gpipe_order_with_virtual_stages():
    schedule = build_schedule("gpipe", 2, 2, 2)
    assert texts(schedule.actions[0]) == "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1"


def test_interleaved_order():
    schedule = build_schedule("interleaved", 2, 2, 4)
    assert texts(schedule.actions[0]) == "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3"
    assert texts(schedule.actions[1]) == "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3"


def test_interleaved_deals_the_remainder_evenly():
    schedule = build_schedule("interleaved", 4, 2, 11)
    forwards = [action for action in schedule.actions[0] if action.kind is Kind.F]
    assert texts(forwards[:7]) == "0F0 0F1 0F2 0F3 0F4 0F5 4F0"
    assert texts(forwards[12:18]) == "0F6 0F7 0F8 0F9 0F10 4F6"


def test_micro_batch_group_size_is_honoured():
    schedule = build_schedule("interleaved", 2, 2, 8, micro_batch_group_size=4)
    assert texts(schedule.actions[0][:5]) == "0F0 0F1 0F2 0F3 2F0"


def test_lowered_steps_of_a_small_schedule():
    lowered = lower(build_schedule("1f1b", 2, 1, 3))
    assert texts(lowered.steps[0]) == (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0[0] 0B0[0] 0F2 0SEND_F2<0SEND_F0 0RECV_B1[0] 0B1[0] 0RECV_B2[0] 0B2[0] "
        "0REDUCE_GRAD"
    )
    assert texts(lowered.steps[1]) == (
        "1RECV_F0[0] 1F0[0] 1RECV_F1[1] 1B0 1SEND_B0 1F1[1] 1RECV_F2[0] 1B1 1SEND_B1 1F2[0] 1B2 1REDUCE_GRAD "
        "1SEND_B2<1SEND_B0"
    )
    assert lowered.num_activation_slots == (0, 2)
    assert lowered.num_gradient_slots == (1, 0)


def test_frozen_stages_have_no_backward_and_get_no_gradient():
    lowered = lower(build_schedule("1f1b", 4, 1, 6, first_trainable_stage=2))
    kinds = [{step.action.kind for step in steps} for steps in lowered.steps]
    assert kinds[0] == {Kind.F, Kind.SEND_F}
    assert kinds[1] == {Kind.F, Kind.RECV_F, Kind.SEND_F}
    assert kinds[2] == {Kind.F, Kind.B, Kind.RECV_F, Kind.SEND_F, Kind.RECV_B, Kind.GRAD_SYNC}


@pytest.mark.parametrize("num_micro_batches", [16, 64])
def test_frozen_stages_do_not_run_far_ahead(num_micro_batches):
    """Nothing but the walk paces a frozen stage; its consumer's buffers must not grow with the step."""
    lowered = lower(build_schedule("1f1b", 4, 1, num_micro_batches, first_trainable_stage=2))
    assert max(lowered.num_activation_slots) <= 5


def test_one_rank_needs_no_messages():
    lowered = lower(build_schedule("interleaved", 1, 3, 4))
    assert {step.action.kind for step in lowered.steps[0]} == {Kind.F, Kind.B, Kind.GRAD_SYNC}
    assert lowered.num_activation_slots == lowered.num_gradient_slots == (0,)
    assert not any(lowered.schedule.crosses_ranks(stage) for stage in range(3))


def test_budgets_are_reached():
    """A budget that is never reached would prove nothing."""
    for name, num_ranks, num_virtual, num_micro_batches in [
        ("gpipe", 4, 2, 5),
        ("1f1b", 4, 1, 8),
        ("1f1b", 6, 1, 3),
        ("interleaved", 4, 2, 8),
        ("interleaved", 4, 3, 7),
        ("interleaved", 5, 2, 3),
    ]:
        schedule = build_schedule(name, num_ranks, num_virtual, num_micro_batches)
        assert simulate(lower(schedule)).peak_in_flight == schedule.max_in_flight


def test_schedules_are_cached_by_their_arguments():
    assert build_schedule("1f1b", 4, 1, 8) is build_schedule("1f1b", 4, 1, 8)
    assert lower(build_schedule("1f1b", 4, 1, 8)) is lower(build_schedule("1f1b", 4, 1, 8))


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("zigzag", 2, 1, 4), {}, "no schedule 'zigzag'; choose one of gpipe, 1f1b, interleaved"),
        (("1f1b", 0, 1, 4), {}, "num_ranks is 0"),
        (("1f1b", 2, 1, 0), {}, "num_micro_batches is 0"),
        (("interleaved", 2, 0, 4), {}, "num_virtual_stages is 0"),
        (("1f1b", 2, 2, 4), {}, "use interleaved"),
        (("interleaved", 4, 2, 8), {"micro_batch_group_size": 3}, "the least value is 4"),
        (("interleaved", 4, 2, 8), {"micro_batch_group_size": 0}, "the least value is 4"),
        (("gpipe", 4, 2, 8), {"micro_batch_group_size": 4}, "belongs to interleaved"),
        (("1f1b", 4, 1, 8), {"first_trainable_stage": 4}, "outside 0 to 3"),
        (("1f1b", 4, 1, 8), {"first_trainable_stage": -1}, "outside 0 to 3"),
    ],
)
def test_impossible_arguments_are_refused_in_a_sentence(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_schedule(*arguments, **options)


def check(name, num_ranks, num_virtual, num_micro_batches, **options):
    # Past the caches: thousands of schedules would push out each other.
    schedule = build_schedule.__wrapped__(name, num_ranks, num_virtual, num_micro_batches, **options)
    lowered = lower.__wrapped__(schedule)
    verify(lowered)
    num_backwards = sum(step.action.kind is Kind.B for steps in lowered.steps for step in steps)
    trainable = 0 if schedule.forward_only else schedule.num_stages - schedule.first_trainable_stage
    assert num_backwards == trainable * num_micro_batches


def shapes(all_micro_batches):
    for num_ranks in range(1, 9):
        for num_micro_batches in all_micro_batches:
            yield "1f1b", num_ranks, 1, num_micro_batches
            for num_virtual in range(1, 5):
                yield "gpipe", num_ranks, num_virtual, num_micro_batches
                yield "interleaved", num_ranks, num_virtual, num_micro_batches


# Of 1F1B and GPipe only matters whether there are fewer micro-batches than ranks, as many or more; the interleaved
# schedule deals each number in a way of its own.
SOME = (*range(1, 10), 13)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_whole_grid_is_correct(num_ranks):
    for shape in shapes(range(1, 33)):
        name, ranks, _, num_micro_batches = shape
        if ranks == num_ranks and (name == "interleaved" or num_micro_batches in SOME):
            check(*shape)


@pytest.mark.parametrize(
    "all_micro_batches", [(1, 3, 6), pytest.param((9, 12, 16, 21, 27, 31), marks=pytest.mark.slow)]
)
def test_evaluation_grid_is_correct(all_micro_batches):
    for shape in shapes(all_micro_batches):
        check(*shape, forward_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("all_micro_batches", [(2, 5), (1, 11)])
def test_frozen_grid_is_correct(all_micro_batches):
    for name, num_ranks, num_virtual, num_micro_batches in shapes(all_micro_batches):
        num_stages = num_ranks * num_virtual
        for first_trainable_stage in {1, num_stages // 2, num_stages - 1} & set(range(1, num_stages)):
            check(name, num_ranks, num_virtual, num_micro_batches, first_trainable_stage=first_trainable_stage)


@pytest.mark.parametrize("group", [4, 5, 6, 9])
def test_group_sizes_are_correct(group):
    for num_micro_batches in range(1, 21):
        check("interleaved", 4, 3, num_micro_batches, micro_batch_group_size=group)
