"""Builds a copy of the project whose CPU operators are the CUDA kernels, compiled for the CPU.

The launches in csrc/cuda are rewritten as calls of the emulation beside this file and registered for the CPU, in place
of the CPU's own operators. Nothing is written but the folder that is named: it gets the package, the tests, and the
library built for them. `make emulated-test` runs this and then the tests in that folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent
HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"

# kernel<SOME, 8><<<grid, threads, 0, stream>>>(arguments);
LAUNCH = re.compile(r"([\w:]+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)
STORE = re.compile(r'asm volatile\("st\.global\.v4\.b32.*?\);', re.DOTALL)
RECIPROCAL = re.compile(r'asm\("rcp\.approx.*?\);', re.DOTALL)
POWER = re.compile(r'asm\("ex2\.approx.*?\);', re.DOTALL)
# It is the last thing in a file of CPU operators.
REGISTRATION_ON_CPU = re.compile(r"STABLE_TORCH_LIBRARY_IMPL\(megallm, CPU, .*", re.DOTALL)

FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
# Slow code that is compiled quickly; slower code that is compiled still more quickly.
OPTIMISATION = ("-O1", "-g1")
QUICK = ("-O0", "-g0")
# An access that is not aligned as its type must be is reported, and ends the process.
CHECKS = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")


def has_cuda_headers() -> bool:
    return (HEADERS / "cuda_runtime.h").is_file()


def cuda_headers() -> Path:
    if not has_cuda_headers():
        raise SystemExit(
            f"The emulated kernels are compiled with a CUDA toolkit's headers, and {HEADERS}/cuda_runtime.h is not "
            "there. Install a toolkit (no GPU and no driver is needed), or let CUDA_HOME name the folder of one."
        )
    return HEADERS


def replace(pattern: re.Pattern[str], replacement: str, source: str, what: str) -> str:
    changed, count = pattern.subn(replacement, source)
    assert count, f"{what}: nothing looks like {pattern.pattern}; has the code changed its style?"
    return changed


def rewrite_launches(source: str) -> str:
    changed = LAUNCH.sub(r"emulation::Launch(\2).run([&] { \1(\3); });", source)
    assert "<<<" not in changed, "a launch is written in a way that is not known here"
    return changed


def rewrite_sources(tree: Path) -> None:
    """Copies csrc to `tree` and makes its kernels C++ for the CPU."""
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("data"))
    shutil.copy(EMULATION / "emulation.h", tree / "csrc")
    shutil.copy(EMULATION / "emulation.cpp", tree / "csrc")
    for file in (tree / "csrc/cuda").glob("*.cu"):
        source = rewrite_launches(file.read_text())
        source = replace(re.compile(r"\(megallm, CUDA,"), "(megallm, CPU,", source, file.name)
        file.with_suffix(".cpp").write_text('#include "emulation.h"\n' + source)
    for file in (tree / "csrc/include").glob("*.cuh"):
        file.write_text(rewrite_launches(file.read_text()))
    support = tree / "csrc/include/cuda_support.cuh"
    plain = replace(STORE, "*pointer = words;", support.read_text(), support.name)
    plain = replace(RECIPROCAL, "result = 1.0f / x;", plain, support.name)
    support.write_text(replace(POWER, "result = exp2f(x);", plain, support.name))
    # What stays are the operators' signatures.
    for file in (tree / "csrc/cpu").glob("*.cpp"):
        if "STABLE_TORCH_LIBRARY_FRAGMENT" in file.read_text():
            file.write_text(replace(REGISTRATION_ON_CPU, "", file.read_text(), file.name))


def copy_python(tree: Path) -> None:
    """The package without its library, and the tests."""
    for folder in ("megallm", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    # The kernel asks for the order of the rows, the CPU's own operator does without.
    embedding = tree / "megallm/ops/embedding.py"
    unsorted = re.compile(r" if rows\.is_cuda else None")
    embedding.write_text(replace(unsorted, "", embedding.read_text(), embedding.name))


def join_sources(tree: Path) -> list[Path]:
    """What is to be compiled: most of the time goes into headers, which files that are joined read once.

    The kernels are two, for two processes.
    """
    kernels, others = (sorted((tree / "csrc" / room).glob("*.cpp")) for room in ("cuda", "cpu"))
    joined = {"kernels_0.cpp": kernels[::2], "kernels_1.cpp": kernels[1::2], "cpu.cpp": others}
    for name, files in joined.items():
        text = "".join(f'#include "{file.parent.name}/{file.name}"\n' for file in files)
        (tree / "csrc" / name).write_text(text)
    return [tree / "csrc" / name for name in (*joined, "emulation.cpp", "bindings/module.cpp")]


def build(tree: Path, headers: Path, optimisation: Sequence[str] = OPTIMISATION) -> None:
    """Compiles csrc of `tree` to its megallm/_C.so."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [tree / "csrc", *cpp_extension.include_paths(), headers, sysconfig.get_path("include")]
    defined = '-DMEGALLM_CUDA_ARCHITECTURES="emulated"'
    flags = [*FLAGS, *optimisation, defined, *(f"-I{folder}" for folder in includes)]
    sources = join_sources(tree)

    def compile_one(source: Path) -> None:
        # The CPU's own operators are not run.
        checks = () if source.name == "cpu.cpp" else CHECKS
        command = [*compiler, *flags, *checks, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as jobs:
        list(jobs.map(compile_one, sources))
    objects = [str(source.with_suffix(".o")) for source in sources]
    folders = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    library = str(tree / "megallm/_C.so")
    subprocess.run([*compiler, "-shared", *CHECKS, *objects, *folders, *libraries, "-o", library], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="the folder; what it has is removed first")
    parser.add_argument("--quick", action="store_true", help="compile quickly what then runs slowly")
    arguments = parser.parse_args()
    tree, headers = arguments.tree.resolve(), cuda_headers()
    shutil.rmtree(tree, ignore_errors=True)
    rewrite_sources(tree)
    copy_python(tree)
    build(tree, headers, QUICK if arguments.quick else OPTIMISATION)


if __name__ == "__main__":
    main()
