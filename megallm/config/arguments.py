"""The command line: argparse over the tree, the file of `--config`, and every problem of both in one answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megallm.config.dictionary import build, read_yaml
from megallm.config.fields import REQUIRED, Field, all_fields, from_text, nearest_hint, sections
from megallm.config.megatron import ALIASES, IGNORED, LAYERS_PER_VIRTUAL_STAGE, REFUSED, Ignored, Refused, answer
from megallm.config.report import stop, warn_once
from megallm.config.resolve import PROGRAMS
from megallm.config.stage_layout import parse_stage_layout
from megallm.config.tree import Config

_FILE = "config_file"
_LAYERS_PER_STAGE = "layers_per_virtual_stage"
_ALIASES_HELP = "Other names, as Megatron's scripts use them."
_METAVARS = {int: "N", float: "X", str: "TEXT", list: "TEXT"}


def parse_arguments(argv: Sequence[str], *, prog: str, description: str, architecture: str | None = None) -> Config:
    """The configuration of a command line `argv` (without the program's name) that trains an `architecture`, or any.

    Flags win over the file that `--config` names. All problems of the flags and the file go to the standard error
    stream together, and the program leaves with exit code 2 (SystemExit). Flags of Megatron that have no effect here
    are listed in one warning. Values are checked one by one only: whether they fit together is the matter of
    `megallm.plan.validate`, and derived defaults are filled in by `resolve`.
    """
    for number, word in enumerate(argv):
        if word in ("-h", "--help"):
            print(_help(prog, description, [other for other in argv[number + 1 :] if not other.startswith("-")]))
            raise SystemExit(0)
    parser = build_parser(prog, description)
    line = _read_line(parser, argv)
    _find_conflicts(line)
    config = _assemble(line, architecture)
    if line.problems:
        stop(prog, line.problems)
    warn_once(prog, line.warnings)
    return config


def _help(prog: str, description: str, words: list[str]) -> str:
    """Help on all flags, or on those whose name or help holds all `words`, Megatron's among them that are not ours."""
    text = build_parser(prog, description, words).format_help()
    if not words:
        return text + f"\n{prog} --help WORD shows the flags that have to do with it, {prog} --help rotary for example."
    foreign = [
        f"  {entry.flag} {'is ignored' if isinstance(entry, Ignored) else 'is not supported'}: {entry.reason}"
        for entry in (*IGNORED, *REFUSED)
        if _is_about(words, entry.flag, entry.reason)
    ]
    if foreign:
        return text + "\nMegatron's flags that are answered only:\n" + "\n".join(foreign)
    if text.count("\n  --") > 1:  # more than --config, which is always there
        return text
    parts = sorted({part for flag in all_flags() for part in flag.removeprefix("--").split("-")})
    return text + f"\nno flag has to do with {' '.join(words)}{nearest_hint(' '.join(words).lower(), parts)}"


def _is_about(words: Sequence[str], flag: str, text: str) -> bool:
    return all(word.lower() in f"{flag} {text}".lower() for word in words)


def build_parser(prog: str, description: str, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of all flags, in one group per section of the tree. It sets what is given and nothing else.

    With `words`, of those flags only whose name or help holds all of them: for a help text.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] [flags]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
    )
    parser.add_argument(
        "--config", dest=_FILE, metavar="FILE.yaml", help="the same tree in YAML; flags win over the file"
    )
    groups = {
        # A group without flags is not shown if it has no description either.
        section: parser.add_argument_group(section, None if words else (section_class.__doc__ or "").strip())
        for section, section_class in sections()
    }
    for entry in all_fields():
        if _is_about(words, f"{entry.flag} {entry.off_flag or ''}", entry.help):
            _add_field(groups[entry.section], entry)
    _add_aliases(parser.add_argument_group("aliases", None if words else _ALIASES_HELP), words)
    return parser


@dataclass
class _Line:
    """What a command line says: flags by what they set, and what is wrong with it."""

    settings: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _add_field(group: argparse._ArgumentGroup, entry: Field) -> None:
    text = described(entry).replace("%", "%%")
    if entry.kind is bool:
        group.add_argument(entry.flag, dest=entry.path, action="store_true", help=text)
        if entry.off_flag is not None:
            group.add_argument(entry.off_flag, dest=entry.path, action="store_false", help=f"switches {entry.flag} off")
        return
    metavar = "{" + ",".join(map(str, entry.choices)) + "}" if entry.choices else _METAVARS[entry.kind]
    if entry.kind is list:
        group.add_argument(entry.flag, dest=entry.path, nargs="+", metavar=metavar, help=text)
    else:
        group.add_argument(entry.flag, dest=entry.path, type=_converter(entry), metavar=metavar, help=text)


def _add_aliases(group: argparse._ArgumentGroup, words: Sequence[str]) -> None:
    by_path = {entry.path: entry for entry in all_fields()}
    for alias in ALIASES:
        meaning = f"{by_path[alias.path].flag} {alias.value}" + (", unless it is given" if alias.yields else "")
        if not _is_about(words, alias.flag, meaning):
            continue
        group.add_argument(alias.flag, dest=alias.path, action="store_const", const=alias.value, help=meaning)
    stages = by_path["parallel.num_virtual_stages_per_pipeline_rank"]
    if not _is_about(words, LAYERS_PER_VIRTUAL_STAGE, stages.help):
        return
    layers = Field("", "", int, False, None, LAYERS_PER_VIRTUAL_STAGE, None, "", None)
    group.add_argument(
        LAYERS_PER_VIRTUAL_STAGE,
        dest=_LAYERS_PER_STAGE,
        type=_converter(layers),
        metavar="N",
        help=f"{stages.flag} layers / (pipeline size x N)",
    )


def described(entry: Field) -> str:
    """The help text of a field with its default, where that says something."""
    if entry.path in REQUIRED:
        return f"{entry.help} (required)"
    if entry.kind is bool:
        return f"{entry.help} (default: on)" if entry.default else entry.help
    if entry.default in (None, []) or "default" in entry.help:
        return entry.help
    return f"{entry.help} (default: {entry.default})"


def _converter(entry: Field) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return from_text(entry, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _read_line(parser: argparse.ArgumentParser, argv: Sequence[str]) -> _Line:
    """Every flag with its values, parsed by itself, so that one mistake hides no other."""
    line = _Line()
    stray, groups = _group_by_flag(argv)
    if stray:
        line.problems.append(f"{' '.join(stray)} stands before the first flag and belongs to none")
    for flag, values in groups:
        # A value such as -1e-3 must not be taken for a flag.
        words = [f"{flag}={values[0]}"] if values and values[0].startswith("-") else [flag, *values[:1]]
        try:
            found, rest = parser.parse_known_args([*words, *values[1:]])
        except argparse.ArgumentError as error:
            line.problems.append(f"{flag} {error.message}" if values else f"{flag} needs a value")
            continue
        if vars(found):
            ((path, value),) = vars(found).items()
            line.settings.setdefault(path, []).append((flag, value))
            if rest:
                line.problems.append(_too_many_values(flag, values, rest))
        else:
            _answer_foreign(flag, values, line)
    return line


def _group_by_flag(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Words before the first flag, then each flag with the words that follow it. -1e-3 is a value, -lr a flag."""
    stray: list[str] = []
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha() and not _is_number(word)):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            stray.append(word)
    return stray, groups


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _too_many_values(flag: str, values: list[str], rest: list[str]) -> str:
    if len(values) > len(rest):
        return f"{flag} takes one value, not {len(values)}: {' '.join(values)}"
    hint = f"; write {flag} --num-query-groups {values[0]}" if flag == "--group-query-attention" else ""
    return f"{flag} is a switch and takes no value, not {' '.join(values)}{hint}"


def _answer_foreign(flag: str, values: list[str], line: _Line) -> None:
    known = answer(flag, values)
    if known is None:
        line.problems.append(f"{flag} is unknown{nearest_hint(flag.replace('_', '-'), all_flags())}")
    elif isinstance(known, Refused):
        line.problems.append(f"{' '.join([flag, *values])} is not supported: {known.reason}")
    else:
        sentence = f"{flag} is ignored: {known.reason}"
        if sentence not in line.warnings:
            line.warnings.append(sentence)


def all_flags() -> list[str]:
    """Every flag of ours, switches that turn others off and aliases among them."""
    flags = ["--config", LAYERS_PER_VIRTUAL_STAGE, *(alias.flag for alias in ALIASES)]
    for entry in all_fields():
        flags += [entry.flag] if entry.off_flag is None else [entry.flag, entry.off_flag]
    return flags


def _find_conflicts(line: _Line) -> None:
    """Two different flags that set one field to two values. One flag given twice is none: the last counts."""
    yielding = {alias.flag for alias in ALIASES if alias.yields}
    for path, settings in line.settings.items():
        others = [pair for pair in settings if pair[0] not in yielding]
        if others:
            settings[:] = others
        last = dict(settings)
        if len(set(map(str, last.values()))) > 1:
            line.problems.append(f"{' and '.join(last)} contradict each other: both set {path}; keep one")
    stages = line.settings.get("parallel.num_virtual_stages_per_pipeline_rank")
    if stages and _LAYERS_PER_STAGE in line.settings:
        line.problems.append(f"{LAYERS_PER_VIRTUAL_STAGE} and {stages[0][0]} say the same in two ways; keep one")


def _assemble(line: _Line, architecture: str | None) -> Config:
    """The tree of the file and the flags, of a model of this architecture."""
    values: dict[str, Any] = {}
    if _FILE in line.settings:
        files = [file for _, file in line.settings[_FILE]]
        if len(files) > 1:
            line.problems.append(
                f"--config is given {len(files)} times ({', '.join(files)}), but a run has one file; "
                "flags beside it win over what it says"
            )
        values, problems = read_yaml(files[-1])
        line.problems += problems
    yielding = {alias.flag for alias in ALIASES if alias.yields}
    for path, settings in line.settings.items():
        flag, value = settings[-1]
        if path not in (_FILE, _LAYERS_PER_STAGE) and not (flag in yielding and path in values):
            values[path] = value
    if architecture is not None:
        asked = values.setdefault("model.architecture", architecture)
        if asked != architecture and asked in PROGRAMS:
            line.problems.append(
                f"--architecture {asked}: {PROGRAMS[asked]} trains that, and {PROGRAMS[architecture]} {architecture}"
            )
    if _LAYERS_PER_STAGE in line.settings:
        stages = _virtual_stages(build(values), line.settings[_LAYERS_PER_STAGE][-1][1], line.problems)
        values["parallel.num_virtual_stages_per_pipeline_rank"] = stages
    values.setdefault("parallel.num_virtual_stages_per_pipeline_rank", _laid_out_virtual_stages(build(values)))
    _imply(values, line)
    return build(values)


def _imply(values: dict[str, Any], line: _Line) -> None:
    """What Megatron's scripts leave unsaid, or say by a number that means none."""
    has_files = values.get("data.vocab_file") and values.get("data.merge_file")
    if values.get("data.tokenizer_type") is None and has_files:
        values["data.tokenizer_type"] = "GPT2BPETokenizer"
    is_bert = values.get("model.architecture") == "bert"
    if values.get("data.tokenizer_type") is None and is_bert and values.get("data.vocab_file"):
        values["data.tokenizer_type"] = "BertWordPieceLowerCase"
    reads_none = values.get("training.eval_iters") == 0 and not values.get("data.full_validation")
    if reads_none and values.get("training.eval_interval") is not None:
        values["training.eval_interval"] = None
        line.warnings.append("--eval-interval is ignored: --eval-iters 0 switches evaluations off")


def _laid_out_virtual_stages(config: Config) -> int:
    """Virtual stages that a layout of the stages makes; what is wrong with it is told where all values are checked."""
    parallel = config.parallel
    try:
        num_stages = len(parse_stage_layout(parallel.pipeline_model_parallel_layout or "EL"))
    except ValueError:
        return 1
    return max(1, num_stages // max(1, parallel.pipeline_model_parallel_size))


def _virtual_stages(config: Config, layers_per_stage: int, problems: list[str]) -> int:
    """Virtual stages on each pipeline rank, of `layers_per_stage` layers each."""
    parallel, pipeline = config.parallel, config.parallel.pipeline_model_parallel_size
    accounted = parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    layers = config.model.num_layers + accounted
    given = f"{LAYERS_PER_VIRTUAL_STAGE} {layers_per_stage}"
    if layers_per_stage < 1:
        problems.append(f"{given} must be at least 1")
    elif config.model.num_layers < 1 or pipeline < 1:
        pass  # The missing or impossible value is reported where all values are checked.
    elif layers % (pipeline * layers_per_stage):
        fitting = [n for n in range(1, layers + 1) if layers % (pipeline * n) == 0]
        way_out = f"use {' or '.join(map(str, fitting))}" if fitting else "it needs layers that divide by the pipeline"
        more = f" and the {accounted} accounted for" if accounted else ""
        problems.append(
            f"{given} does not cut --num-layers {config.model.num_layers}{more} over --pipeline-model-parallel-size "
            f"{pipeline} evenly: "
            f"{layers} % ({pipeline} x {layers_per_stage}) = {layers % (pipeline * layers_per_stage)}; {way_out}, "
            "or --num-virtual-stages-per-pipeline-rank, which takes any number of layers"
        )
    else:
        return layers // (pipeline * layers_per_stage)
    return 1
