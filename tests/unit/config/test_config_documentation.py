"""The page of flags equals the program."""

from __future__ import annotations

from pathlib import Path

from megallm.config.documentation import differences_table, flags_page
from megallm.config.fields import all_fields
from megallm.config.megatron import ALIASES, DIFFERENCES, IGNORED, REFUSED

PAGE = Path(__file__).parents[3] / "docs" / "flags.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == flags_page(), "run `python -m megallm.config > docs/flags.md`"


def test_page_holds_every_flag() -> None:
    page = flags_page()
    for entry in all_fields():
        assert f"| `{entry.flag}`" in page
        assert entry.off_flag is None or f"`{entry.off_flag}`" in page
    for known in (*ALIASES, *IGNORED, *REFUSED):
        assert f"`{known.flag}" in page


def test_tables_are_well_formed() -> None:
    columns = 0
    for line in [*flags_page().splitlines(), "", *differences_table().splitlines()]:
        if not line.startswith("|"):
            columns = 0
            continue
        columns = columns or line.count(" | ")
        assert line.count(" | ") == columns


def test_the_page_for_those_who_come_from_megatron_has_the_table_of_differences() -> None:
    assert all(f"| {entry.subject} |" in differences_table() for entry in DIFFERENCES)
    assert differences_table() in (PAGE.parent / "from-megatron.md").read_text()
