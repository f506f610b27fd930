"""The page of all flags, from the tree."""

from __future__ import annotations

from megallm.config.fields import REQUIRED, Field, all_fields, sections
from megallm.config.megatron import ALIASES, DIFFERENCES, IGNORED, LAYERS_PER_VIRTUAL_STAGE, REFUSED

_HEAD = """\
# Flags

Written by `python -m megallm.config > docs/flags.md`; a test keeps it equal to the program.

Every flag is a field of one tree. `--config FILE.yaml` reads the same tree from a file
(`model: {num_layers: 4}`), and flags win over the file. Names and meaning are Megatron's where the thing is the same;
[from-megatron.md](from-megatron.md) lists the differences on purpose.
"""


def flags_page() -> str:
    """The Markdown text of `docs/flags.md`."""
    fields = all_fields()
    parts = [_HEAD]
    for section, section_class in sections():
        rows = [_row(entry) for entry in fields if entry.section == section]
        parts.append(
            f"## {section}\n\n{(section_class.__doc__ or '').strip()}\n\n" + _table("Flag | Default | Meaning", rows)
        )
    parts.append(_aliases({entry.path: entry.flag for entry in fields}))
    parts.append(
        "## Megatron's flags without effect here\n\nThey are accepted and listed in one warning.\n\n"
        + _table("Flag | Why", [f"`{entry.flag}` | {entry.reason}" for entry in IGNORED])
    )
    parts.append(
        "## Megatron's flags that are refused\n\n"
        + _table(
            "Flag | Accepted as | Why, and what to use",
            [f"`{entry.flag}` | {_code(entry.harmless)} | {entry.reason}" for entry in REFUSED],
        )
    )
    return "\n".join(parts)


def differences_table() -> str:
    """The table of `docs/from-megatron.md`."""
    return _table(
        "What | Megatron | Here | Why",
        [f"{entry.subject} | {entry.megatron} | {entry.here} | {entry.reason}" for entry in DIFFERENCES],
    )


def _aliases(flag_by_path: dict[str, str]) -> str:
    rows = [f"`{alias.flag}` | `{flag_by_path[alias.path]} {alias.value}`" for alias in ALIASES]
    stages = flag_by_path["parallel.num_virtual_stages_per_pipeline_rank"]
    rows.append(f"`{LAYERS_PER_VIRTUAL_STAGE} N` | `{stages}` layers / (pipeline size x N)")
    return "## Aliases\n\n" + _table("Switch | Means", rows)


def _row(entry: Field) -> str:
    flag = f"`{entry.flag}`" + (f", `{entry.off_flag}`" if entry.off_flag else "")
    meaning = entry.help + (f": {_code(entry.choices)}" if entry.choices else "")
    return f"{flag} | {_default(entry)} | {meaning}"


def _default(entry: Field) -> str:
    if entry.path in REQUIRED:
        return "required"
    if entry.kind is bool:
        return "on" if entry.default else "off"
    return "" if entry.default in (None, []) else f"`{entry.default}`"


def _code(words: tuple[object, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(head: str, rows: list[str]) -> str:
    rule = " | ".join("---" for _ in head.split(" | "))
    return "".join(f"| {row} |\n" for row in [head, rule, *rows])
