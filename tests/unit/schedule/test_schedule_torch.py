"""Equality with torch.distributed.pipelining, where it defines the same thing."""

from types import SimpleNamespace

import pytest

from megallm.schedule import Kind, Schedule, build_schedule, lower

torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")


def torch_interleaved_with_bubbles(num_ranks, num_virtual, num_micro_batches):
    """Torch's order of each rank, without building stages and process groups. None stands for a bubble."""
    schedule = object.__new__(torch_schedules.ScheduleInterleaved1F1B)
    schedule.pp_group_size = num_ranks
    schedule.n_local_stages = num_virtual
    schedule._n_microbatches = num_micro_batches
    schedule.number_of_rounds = max(1, num_micro_batches // num_ranks)
    schedule.microbatches_per_round = num_micro_batches // schedule.number_of_rounds
    return [schedule._calculate_single_rank_operations(rank) for rank in range(num_ranks)]


def torch_interleaved(*shape):
    return [[action for action in order if action is not None] for order in torch_interleaved_with_bubbles(*shape)]


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_interleaved_order_is_torchs(num_ranks):
    """Where m divides by p; and beyond, where torch's rounds come out even."""
    compared = 0
    for num_virtual in range(1, 5):
        for num_micro_batches in range(1, 33):
            if num_micro_batches % max(1, num_micro_batches // num_ranks):
                continue
            ours = build_schedule.__wrapped__("interleaved", num_ranks, num_virtual, num_micro_batches).actions
            theirs = torch_interleaved(num_ranks, num_virtual, num_micro_batches)
            assert [list(map(str, order)) for order in ours] == [list(map(str, order)) for order in theirs]
            compared += num_micro_batches % num_ranks == 0
    assert compared == 4 * (32 // num_ranks)


@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 2, 4), (4, 2, 8), (4, 3, 7), (3, 4, 6)])
def test_messages_stand_where_torch_puts_them(shape):
    ours = lower(build_schedule("interleaved", *shape))
    num_ranks, num_virtual, _ = shape
    theirs = torch_schedules._add_send_recv(
        dict(enumerate(torch_interleaved(*shape))), lambda stage: stage % num_ranks, num_ranks * num_virtual
    )
    for rank, steps in enumerate(ours.steps):
        actions = [str(step.action) for step in steps if step.action.kind is not Kind.GRAD_SYNC]
        assert actions == list(map(str, theirs[rank]))


@pytest.mark.parametrize(("name", "num_virtual"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 3)])
def test_torch_reads_our_csv_and_we_read_torchs(name, num_virtual, tmp_path):
    schedule = build_schedule(name, 4, num_virtual, 8)
    path = tmp_path / "ours.csv"
    path.write_text(schedule.to_csv(), newline="")
    reader = SimpleNamespace(pipeline_order={}, _validate_and_set_stage_mapping=lambda order: None)
    torch_schedules.PipelineScheduleMulti._load_csv(reader, str(path))
    placement = torch_schedules._validate_schedule(reader.pipeline_order, 4, 4 * num_virtual, 8)
    assert tuple(placement[stage] for stage in range(4 * num_virtual)) == schedule.placement
    torch_schedules.PipelineScheduleMulti._dump_csv(reader, str(tmp_path / "theirs.csv"))
    read = Schedule.from_csv((tmp_path / "theirs.csv").read_text(), name=name)
    assert read.actions == schedule.actions


def test_torchs_bubbles_are_skipped(tmp_path):
    orders = torch_interleaved_with_bubbles(3, 2, 6)
    assert None in orders[1]
    writer = SimpleNamespace(pipeline_order=dict(enumerate(orders)))
    torch_schedules.PipelineScheduleMulti._dump_csv(writer, str(tmp_path / "torch.csv"))
    read = Schedule.from_csv((tmp_path / "torch.csv").read_text())
    assert read.actions == build_schedule("interleaved", 3, 2, 6).actions
