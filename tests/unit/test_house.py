"""Rules of the house that are checked by reading the code: who imports whom, what is never used, how long things are.

Each rule is a function from a file to complaints. Every rule is also shown a sample that breaks it, and must complain.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The rooms of the package by floor. A room imports from its own floor and from those below, never from above.
FLOORS = (
    (
        "__init__",
        "config",
        "schedule",
        "journal",
        "communication",
        "agreement",
        "mesh",
        "device",
        "parameter",
        "random",
        "ops",
        "info",
        "failpoint",
        "file_lock",
    ),
    ("layers", "optimizer", "data"),
    ("model",),
    ("pipeline", "data_parallel", "checkpoint"),
    ("train", "plan", "convert", "generate"),
    ("workflow", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# These answer a mistake on the command line, or draw a schedule, before torch is loaded or without it.
ROOMS_WITHOUT_TORCH = frozenset({"__init__", "config", "schedule", "plan"})

PICKLING_MODULES = frozenset({"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})
# They run what they read.
FORBIDDEN_NAMES = frozenset(
    {"eval", "exec", "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"}
    | {f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")}
)
OBJECT_COLLECTIVES = frozenset(
    {
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
    }
)

MAX_FUNCTION_LINES = 100
MAX_FILE_LINES = 700

ENTRY_SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "setup.py")
PACKAGE = sorted((ROOT / "megallm").rglob("*.py"))
PROGRAM = [*PACKAGE, *sorted((ROOT / "tools").rglob("*.py")), *ENTRY_SCRIPTS]
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
PYTHON = [*PROGRAM, ROOT / "setup.py", *sorted((ROOT / "tests").rglob("*.py")), *(ROOT / "benchmarks").rglob("*.py")]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: str) -> str:
    """The room that a file of the package belongs to: `megallm/data/feeding/sampler.py` to data, for example."""
    return path.split("/")[1].removesuffix(".py")


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, at any depth. `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import keeps its dots, so that no rule mistakes it for another package.
            origin = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def imported_rooms(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and room of every import from the package itself."""
    known = {room for rooms in FLOORS for room in rooms}
    for line, name in imported_modules(tree):
        words = name.split(".")
        if words[0] == "megallm":
            # `from megallm import __version__` is about the package itself.
            plain = len(words) == 1 or (len(words) == 2 and words[1] not in known)
            yield line, "__init__" if plain else words[1]


def used_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is mentioned: after `import yaml as y`, `y.load` is `yaml.load`."""
    full_name = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_name |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full_name |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    for node in ast.walk(tree):
        words, part = [], node
        while isinstance(part, ast.Attribute):
            words.append(part.attr)
            part = part.value
        if isinstance(part, ast.Name):
            yield part.lineno, ".".join([full_name.get(part.id, part.id), *reversed(words)])


def upward_imports(path: str, source: str) -> list[str]:
    """A file of the package imports from its own floor or below, by full names, and nothing from outside the package
    that is built on it.
    """
    if not path.startswith("megallm/"):
        return []
    room = room_of(path)
    if room not in FLOOR_OF:
        return [f"the room {room} has no floor: enter it in FLOORS"]
    tree = ast.parse(source)
    complaints = []
    for line, name in imported_modules(tree):
        above = {"tools", "tests", "benchmarks", *(script.stem for script in ENTRY_SCRIPTS)}
        if name.startswith("."):
            complaints.append(f"line {line}: a relative import does not say which room it is from")
        elif name.split(".")[0] in above:
            complaints.append(f"line {line}: {name.split('.')[0]} is built on the package, not below it")
    for line, other in imported_rooms(tree):
        if other not in FLOOR_OF:
            complaints.append(f"line {line}: the room {other} has no floor: enter it in FLOORS")
        elif FLOOR_OF[other] > FLOOR_OF[room]:
            complaints.append(
                f"line {line}: {room} on floor {FLOOR_OF[room]} imports {other} from floor {FLOOR_OF[other]}"
            )
    return complaints


def torch_where_none_is_needed(path: str, source: str) -> list[str]:
    """The configuration, the schedules and the plan import neither torch nor numpy, nor a room that does."""
    if not path.startswith("megallm/") or room_of(path) not in ROOMS_WITHOUT_TORCH:
        return []
    tree = ast.parse(source)
    libraries = [
        f"line {line}: {name.split('.')[0]} is imported"
        for line, name in imported_modules(tree)
        if name.split(".")[0] in ("torch", "numpy")
    ]
    rooms = [
        f"line {line}: the room {room} may need torch"
        for line, room in imported_rooms(tree)
        if room not in ROOMS_WITHOUT_TORCH
    ]
    return libraries + rooms


def code_from_data(path: str, source: str) -> list[str]:
    """Nothing read from a file or a message is ever run: no pickle and what is built on it, no eval, no open YAML."""
    tree = ast.parse(source)
    complaints = [
        f"line {line}: {name} is a pickle in disguise or by name"
        for line, name in imported_modules(tree)
        if name.split(".")[0] in PICKLING_MODULES
    ]
    for line, name in used_names(tree):
        if name in FORBIDDEN_NAMES:
            complaints.append(f"line {line}: {name} runs what it reads")
        elif name.split(".")[-1] in OBJECT_COLLECTIVES:
            complaints.append(f"line {line}: {name} sends pickles")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            complaints.append(f"line {node.value.lineno}: allow_pickle is not False")
    return complaints


def global_statements(path: str, source: str) -> list[str]:
    """No function changes a variable of its module."""
    return [
        f"line {node.lineno}: global {', '.join(node.names)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Global)
    ]


def silent_asserts(path: str, source: str) -> list[str]:
    """Every assertion says what is wrong when it fails."""
    return [
        f"line {node.lineno}: an assert without a message"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert) and node.msg is None
    ]


def long_functions(path: str, source: str) -> list[str]:
    return [
        f"line {node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines, {MAX_FUNCTION_LINES} at most"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def long_file(path: str, source: str) -> list[str]:
    count = len(source.splitlines())
    return [f"{count} lines, {MAX_FILE_LINES} at most"] if count > MAX_FILE_LINES else []


def dead_links(path: str, source: str) -> list[str]:
    """Every relative link of a page points to a file or folder of the checkout."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", source, flags=re.DOTALL)
    complaints = []
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)", prose):
        file = target.split("#")[0]
        if file and not re.match(r"[a-z][a-z0-9+.-]*:", file) and not ((ROOT / path).parent / file).exists():
            complaints.append(f"the link {target} leads nowhere")
    return complaints


Rule = Callable[[str, str], list[str]]
RULES: list[tuple[Rule, list[Path]]] = [
    (upward_imports, PACKAGE),
    (torch_where_none_is_needed, PACKAGE),
    (code_from_data, PROGRAM),
    (global_statements, PROGRAM),
    (silent_asserts, PROGRAM),
    (long_functions, PYTHON),
    (long_file, [*PYTHON, *NATIVE]),
    (dead_links, PAGES),
]


@pytest.mark.parametrize(("rule", "files"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_rule_holds(rule: Rule, files: list[Path]) -> None:
    assert files, "there is nothing to check: has a folder been renamed?"
    complaints = [
        f"{relative(file)}: {complaint}" for file in files for complaint in rule(relative(file), file.read_text())
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_rooms_do_not_need_each_other_in_a_circle() -> None:
    """Also where the floor is the same: Python loads many a circle without a word, and readers run in it."""
    needs: dict[str, set[str]] = {}
    for file in PACKAGE:
        room = room_of(relative(file))
        rooms = {other for _, other in imported_rooms(ast.parse(file.read_text()))}
        needs.setdefault(room, set()).update(rooms - {room})
    TopologicalSorter(needs).prepare()


BROKEN = [
    (upward_imports, "megallm/layers/linear.py", "from megallm.train.step import train_step"),
    (upward_imports, "megallm/mesh.py", "def f():\n    import megallm.layers.norm as norm"),
    (upward_imports, "megallm/data/feeding/loader.py", "from megallm import model"),
    (upward_imports, "megallm/model/gpt.py", "from .block import TransformerLayer"),
    (upward_imports, "megallm/train/loop.py", "from tools.schedule import main"),
    (upward_imports, "megallm/train/loop.py", "import pretrain_gpt"),
    (upward_imports, "megallm/attic/old.py", ""),
    (upward_imports, "megallm/train/loop.py", "from megallm.attic.old import something"),
    (torch_where_none_is_needed, "megallm/config/tree.py", "import torch"),
    (torch_where_none_is_needed, "megallm/schedule/render.py", "def f():\n    from torch.nn import functional"),
    (torch_where_none_is_needed, "megallm/plan/flops.py", "import numpy as np"),
    (torch_where_none_is_needed, "megallm/plan/flops.py", "from megallm.mesh import MeshShape"),
    (code_from_data, "tools/x.py", "import pickle"),
    (code_from_data, "tools/x.py", "from cloudpickle import dumps"),
    (code_from_data, "tools/x.py", "value = eval('1')"),
    (code_from_data, "tools/x.py", "exec(open(path).read())"),
    (code_from_data, "tools/x.py", "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)"),
    (code_from_data, "tools/x.py", "import yaml as y\ny.unsafe_load(text)"),
    (code_from_data, "tools/x.py", "import torch\nweights = torch.load(path, weights_only=True)"),
    (code_from_data, "tools/x.py", "from torch import save as write"),
    (code_from_data, "tools/x.py", "import torch.distributed as dist\ndist.all_gather_object(result, 1)"),
    (code_from_data, "tools/x.py", "import numpy as np\nnp.load(path, allow_pickle=True)"),
    (global_statements, "megallm/x.py", "def f():\n    global state\n    state = 1"),
    (silent_asserts, "megallm/x.py", "assert 1 + 1 == 2"),
    (long_functions, "megallm/x.py", "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES),
    (long_file, "megallm/x.py", "\n" * (MAX_FILE_LINES + 1)),
    (dead_links, "docs/x.md", "See [the page](nowhere.md#part)."),
    (dead_links, "docs/x.md", "![picture](images/nothing.svg)"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_rule_objects(rule: Rule, path: str, source: str) -> None:
    assert len(rule(path, source)) == 1


SOUND = [
    (upward_imports, "megallm/train/loop.py", "from megallm.layers.norm import Norm\nfrom megallm.train import step"),
    (upward_imports, "megallm/info.py", "import megallm\nfrom megallm import __version__\nimport megallm.ops.library"),
    (torch_where_none_is_needed, "megallm/plan/flops.py", "import math\nfrom megallm.config.tree import Config"),
    (code_from_data, "tools/x.py", "import torch, yaml\nmodel.eval()\nyaml.safe_load(text)\nother.load(path)"),
    (code_from_data, "tools/x.py", "import numpy as np\nnp.load(path, allow_pickle=False)"),
    (silent_asserts, "megallm/x.py", "assert 1 + 1 == 2, 'arithmetic'"),
    (long_functions, "megallm/x.py", "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)),
    (long_file, "megallm/x.py", "\n" * MAX_FILE_LINES),
    (dead_links, "docs/x.md", "[a](https://example.org) [b](#part) [c](../megallm) `[d](e.md)` [f](../setup.py#L1)"),
]


@pytest.mark.parametrize(("rule", "path", "source"), SOUND)
def test_rule_lets_pass(rule: Rule, path: str, source: str) -> None:
    assert rule(path, source) == []


def test_no_large_file_is_kept() -> None:
    """Every clone carries for ever what was once committed, by mistake too."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: what belongs to the project is not known")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    large = {path.name: path.stat().st_size for path in files if path.is_file() and path.stat().st_size > 2**20}
    assert files and not large, large
