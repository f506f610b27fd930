"""The Chinese page has the commands of the English one."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def commands(page: str, begin: str, end: str) -> list[str]:
    """The lines of indented blocks between two texts of a page."""
    text = (REPOSITORY / page).read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def test_the_chinese_page_has_the_commands_of_the_english_one() -> None:
    english = commands("README.md", "## Training on your own text", "What a mistake costs")
    chinese = commands("README.zh-CN.md", "## 训练自己的文本", "## 先看计划")
    assert len(english) > 10
    assert chinese == english
