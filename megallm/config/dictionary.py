"""The tree as a plain dictionary and as YAML, strictly back again, and the difference of two trees."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megallm.config.fields import Field, all_fields, from_plain, nearest_hint, sections
from megallm.config.megatron import ALIASES
from megallm.config.report import numbered, why_unreadable
from megallm.config.tree import Config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """`config` as nested dictionaries of numbers, texts, booleans, lists and None: what JSON and YAML can hold."""
    return asdict(config)


def from_dict(tree: Any) -> Config:
    """The configuration of nested dictionaries as `to_dict` makes them; what is missing takes its default.

    Raises ValueError that lists every unknown name, with the nearest known one, and every value of a wrong type.
    """
    values, problems = read_tree(tree)
    if problems:
        raise ValueError(f"The configuration cannot be read:\n{numbered(problems)}")
    return build(values)


def to_yaml(config: Config) -> str:
    """`config` as the YAML text that `--config` reads."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def difference_yaml(config: Config) -> str:
    """The same for what differs from the defaults alone: short, and read back to an equal tree."""
    import yaml

    changed: dict[str, dict[str, Any]] = {}
    for path, _, value in difference(Config(), config):
        section, name = path.split(".")
        changed.setdefault(section, {})[name] = value
    return yaml.safe_dump(changed, sort_keys=False)


def read_yaml(path: str) -> tuple[dict[str, Any], list[str]]:
    """The values (`section.name` -> value) that a YAML file gives, and a sentence for each problem in it."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            problems = _repeated_keys(yaml.compose(file, yaml.SafeLoader))
            file.seek(0)
            tree = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"--config {path} cannot be read: {why_unreadable(error)}"]
    except yaml.YAMLError as error:
        return {}, [f"--config {path} is not valid YAML: {' '.join(str(error).split())}"]
    except RecursionError:
        return {}, [f"--config {path} holds itself, or lists within lists without end"]
    values, mistakes = read_tree({} if tree is None else tree)
    return values, [f"in {path}: {problem}" for problem in (*problems, *mistakes)]


def _repeated_keys(node: Any) -> list[str]:
    """A sentence for each name that stands twice in one mapping of a YAML tree: PyYAML would take the last silently."""
    problems: list[str] = []
    lines: dict[str, int] = {}
    for key, value in node.value if node is not None and node.id == "mapping" else ():
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            problems.append(f"{name} stands in line {lines[name]} and again in line {line}; keep one")
        lines[name] = line
        problems += _repeated_keys(value)
    return problems


def read_tree(tree: Any) -> tuple[dict[str, Any], list[str]]:
    """The values (`section.name` -> value) that nested dictionaries give, and a sentence for each problem in them."""
    if not isinstance(tree, dict):
        return {}, [f"the configuration is a mapping of {_names(sections())} to their values, not {tree!r}"]
    by_section: dict[str, dict[str, Field]] = {section: {} for section, _ in sections()}
    for entry in all_fields():
        by_section[entry.section][entry.name] = entry

    values: dict[str, Any] = {}
    problems: list[str] = []
    for section, content in tree.items():
        if section not in by_section:
            problems.append(_unknown_section(str(section), by_section))
        elif content is not None and not isinstance(content, dict):
            problems.append(f"{section} is a mapping of names to values, not {content!r}")
        else:
            _read_section(section, content or {}, by_section, values, problems)
    return values, problems


def build(values: dict[str, Any]) -> Config:
    """The tree in which each `section.name` of `values` has that value and everything else its default."""
    parts: dict[str, dict[str, Any]] = {section: {} for section, _ in sections()}
    for path, value in values.items():
        section, name = path.split(".")
        parts[section][name] = value
    return Config(**{section: section_class(**parts[section]) for section, section_class in sections()})


def difference(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
    """The fields in which two trees differ, in the tree's order: (`section.name`, value in before, value in after)."""
    pairs = ((entry.path, entry.of(before), entry.of(after)) for entry in all_fields())
    return [(path, old, new) for path, old, new in pairs if old != new]


def _read_section(
    section: str,
    content: dict[Any, Any],
    by_section: dict[str, dict[str, Field]],
    values: dict[str, Any],
    problems: list[str],
) -> None:
    known = by_section[section]
    for name, value in content.items():
        if name not in known:
            problems.append(_unknown_name(section, str(name), by_section))
            continue
        try:
            values[known[name].path] = from_plain(known[name], value)
        except ValueError as error:
            problems.append(f"{section}.{name} {error}")


def _unknown_section(word: str, by_section: dict[str, dict[str, Field]]) -> str:
    homes = [section for section, known in by_section.items() if word in known]
    if homes:
        return f"{word} stands at the top, but belongs under {homes[0]}"
    if written := _written(word):
        return f"{word} stands at the top and is a flag, which a file writes as {written}"
    return f"there is no section {word}, only {', '.join(by_section)}{nearest_hint(word, by_section)}"


def _unknown_name(section: str, word: str, by_section: dict[str, dict[str, Field]]) -> str:
    homes = [other for other, known in by_section.items() if word in known]
    if homes:
        return f"{section}.{word} is unknown: {word} belongs under {homes[0]}"
    if written := _written(word):
        return f"{section}.{word} is unknown: it is a flag, which a file writes as {written}"
    # Hyphens are the command line's spelling of the same names.
    return f"{section}.{word} is unknown{nearest_hint(word.replace('-', '_'), by_section[section])}"


def _written(word: str) -> str:
    """How a file says what the flag `word` says, written with hyphens or underscores, where it is no name of the tree;
    else nothing."""
    flag = f"--{word.replace('_', '-')}"
    for alias in ALIASES:
        if alias.flag.replace("_", "-") == flag:
            return f"{alias.path}: {str(alias.value).lower()}"
    for entry in all_fields():
        if flag in (entry.flag, entry.off_flag) and entry.name != word.replace("-", "_"):
            return f"{entry.path}: false" if flag == entry.off_flag else entry.path
    return ""


def _names(pairs: tuple[tuple[str, type], ...]) -> str:
    return ", ".join(name for name, _ in pairs)
