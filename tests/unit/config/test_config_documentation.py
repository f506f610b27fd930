"""The page of flags equals the program."""

from __future__ import annotations

from pathlib import Path

from megallm.config.documentation import flags_page
from megallm.config.fields import all_fields
from megallm.config.megatron import ALIASES, DIFFERENCES, IGNORED, REFUSED

PAGE = Path(__file__).parents[3] / "docs" / "flags.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == flags_page(), "run `python -m megallm.config > docs/flags.md`"


def test_page_holds_every_flag_and_ends_with_the_differences() -> None:
    page = flags_page()
    for entry in all_fields():
        assert f"| `{entry.flag}`" in page
        assert entry.off_flag is None or f"`{entry.off_flag}`" in page
    for known in (*ALIASES, *IGNORED, *REFUSED):
        assert f"`{known.flag}" in page
    last = page[page.rindex("\n## ") :]
    assert last.startswith("\n## Differences to Megatron on purpose")
    assert all(entry.subject in last for entry in DIFFERENCES)


def test_tables_are_well_formed() -> None:
    columns = 0
    for line in flags_page().splitlines():
        if not line.startswith("|"):
            columns = 0
            continue
        columns = columns or line.count(" | ")
        assert line.count(" | ") == columns
