"""Pictures: what is drawn, where, and that files are well formed."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from megallm.schedule import (
    Costs,
    Event,
    Timeline,
    build_schedule,
    chrome_trace,
    lower,
    parse_action,
    side_by_side_svg,
    simulate,
    svg,
    text_grid,
)

SVG = "{http://www.w3.org/2000/svg}"


def timed(name, *shape, **costs):
    return simulate(lower(build_schedule(name, *shape)), Costs(**costs))


def test_text_grid_of_a_small_schedule():
    assert text_grid(timed("1f1b", 2, 1, 2)).splitlines() == [
        "rank 0 F0-F1-      B0====   B1====",
        "rank 1    F0-B0====F1-B1====",
        "1f1b: makespan 9, bubble 33.3%, at most 2 in flight",
    ]


def test_text_grid_names_stages_where_ranks_have_several():
    assert text_grid(timed("interleaved", 1, 2, 1)).splitlines()[0] == "rank 0 0F0-1F0-1B0=====0B0====="


def test_text_grid_keeps_to_its_width():
    timeline = timed("interleaved", 4, 2, 8)
    lines = text_grid(timeline, width=100).splitlines()
    assert max(map(len, lines[:-1])) == 100
    assert re.match(r"rank 0 F", lines[0])
    assert "F0" not in lines[0]
    assert "B7" in lines[0]


def test_text_grid_colour_changes_no_text():
    timeline = timed("interleaved", 2, 2, 4)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text_grid(timeline, color=True))
    assert plain == text_grid(timeline)
    assert "\x1b[" in text_grid(timeline, color=True)


def boxes(picture):
    """(class, x, width, row) of each action in the picture."""
    root = ElementTree.fromstring(picture)
    found = {}
    for box in root.iter(f"{SVG}rect"):
        title = box.find(f"{SVG}title")
        if title is not None:
            key = title.text.split(",")[0]
            found.setdefault(key, []).append(
                (box.get("class"), float(box.get("x")), float(box.get("width")), float(box.get("y")))
            )
    return found


def test_svg_has_a_box_for_every_action_at_its_place():
    timeline = timed("interleaved", 2, 2, 4)
    found = boxes(svg(timeline))
    assert len(found) == len(timeline.compute)
    scale = (960 - 56 - 12) / timeline.makespan
    rows = sorted({entry[3] for entries in found.values() for entry in entries})
    assert len(rows) == 2
    for event in timeline.compute:
        ((style, x, width, y),) = found[f"{event.action} on rank {event.rank}"]
        assert style == f"{event.action.kind.value}{event.action.stage // 2}"
        assert x == pytest.approx(56 + event.start * scale, abs=0.02)
        assert width == pytest.approx((event.end - event.start) * scale, abs=1.1)
        assert y == rows[event.rank]


def test_svg_follows_light_and_dark_pages_and_explains_its_colours():
    picture = svg(timed("interleaved", 2, 2, 2))
    assert "prefers-color-scheme: dark" in picture
    texts = [text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    for label in ("forward, chunk 0", "forward, chunk 1", "backward, chunk 0", "backward, chunk 1", "rank 1"):
        assert label in texts


def test_svg_escapes_names():
    picture = svg(Timeline("a<b & c", timed("1f1b", 1, 1, 1).events))
    assert "a<b" not in picture
    assert "a<b & c" in ElementTree.fromstring(picture).find(f"{SVG}title").text


def test_side_by_side_shares_the_axis():
    """The plan's compute is stretched to the measured compute; a measured step that waits more is longer."""
    planned = timed("1f1b", 2, 1, 2)
    slow = timed("1f1b", 2, 1, 2, forward=0.01, backward=0.02, message=0.005)
    measured = Timeline("measured", slow.events, "s")
    found = boxes(side_by_side_svg(planned, measured))
    (_, planned_x, planned_width, planned_y), (_, measured_x, measured_width, measured_y) = found["0B1 on rank 0"]
    assert planned_width == pytest.approx(measured_width, abs=0.02)
    assert planned_x < measured_x
    assert planned_y < measured_y
    assert measured_x + measured_width == pytest.approx(960 - 12, abs=1.1)


def test_measured_timelines_that_start_late_and_idle_are_drawn():
    events = (
        Event(0, parse_action("0F0"), 50.0, 50.5),
        Event(0, parse_action("0REDUCE_GRAD"), 52.0, 52.1),
        Event(0, parse_action("0B0"), 51.0, 52.0),
    )
    timeline = Timeline("measured", events, "s")
    found = boxes(svg(timeline))
    assert found["0F0 on rank 0"][0][1] == pytest.approx(56)
    assert text_grid(timeline).splitlines()[0] == "rank 0 F0-   B0===="


def test_a_timeline_without_duration_can_be_drawn():
    events = (Event(0, parse_action("0F0"), 1.0, 1.0),)
    ElementTree.fromstring(svg(Timeline("nothing", events)))
    text_grid(Timeline("nothing", events))
    text_grid(Timeline("nothing", ()))


def test_chrome_trace():
    timeline = timed("1f1b", 2, 1, 2, message=0.5)
    records = json.loads(chrome_trace(timeline))["traceEvents"]
    spans = {record["name"]: record for record in records if record["ph"] == "X"}
    assert len(spans) == len(timeline.events)
    forward, send = spans["1F0"], spans["0SEND_F0"]
    assert (forward["pid"], forward["tid"], forward["ts"], forward["dur"]) == (0, 1, 1500.0, 1000.0)
    assert (send["pid"], send["tid"], send["ts"], send["dur"]) == (1, 0, 1000.0, 500.0)
    assert forward["args"] == {"stage": 1, "micro_batch": 0}
    seconds = Timeline("measured", timeline.events, "s")
    records = json.loads(chrome_trace(seconds))["traceEvents"]
    assert next(record["dur"] for record in records if record["name"] == "1F0") == 1e6


def test_a_drawing_does_not_sort_the_events_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = simulate(lower(build_schedule("1f1b", 4, 1, 16)))
    sort, sorted_times = Timeline.compute.fget, []
    monkeypatch.setattr(Timeline, "compute", property(lambda self: sorted_times.append(1) or sort(self)))
    text_grid(timeline)
    assert len(sorted_times) < 10
