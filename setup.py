"""Builds the two native extensions; all other metadata stands in pyproject.toml.

`megallm._C` is the operator library. It uses only the LibTorch stable ABI and Python's limited API, so one binary
serves every torch from 2.11 on, with or without a GPU. The CPU operators are always in it; the CUDA operators join when
a CUDA toolkit is found, whether or not the torch of this machine can use them. `megallm.data.samples._helpers` holds
the loops over numpy arrays that build sample indices.

Both are optional: where there is no C++ compiler, or where one of them does not compile, the package installs without
it, says so, and works on its references in plain torch and numpy.

Environment:
    MEGALLM_CUDA          auto (default): CUDA operators when a toolkit is found; 0: never; 1: their absence is an
                          error, and so is a kernel that spills registers or keeps anything in local memory
    MEGALLM_NATIVE        auto (default): what fails to build is left out; 0: build nothing; 1: a failure is an error
    TORCH_CUDA_ARCH_LIST  GPU architectures, "8.0;9.0+PTX" unless set
    MAX_JOBS              compile jobs at once, 2 unless set
    CUDA_HOME, CUDA_PATH  where the CUDA toolkit is, when it is not beside `nvcc`
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
# The oldest torch whose stable ABI the operators use: major, minor and patch, one byte each.
STABLE_ABI_TARGET = "0x020b000000000000"
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def setting(name: str) -> str:
    """The environment's choice among auto, 0 and 1."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r} is not known: use auto, 0 or 1.")
    return value


def say(line: str) -> None:
    print(f"megallm: {line}", file=sys.stderr, flush=True)


def runs(compiler: str) -> bool:
    try:
        return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def find_cuda_toolkit() -> "Path | None":
    """The first prefix with both the compiler and the headers: the `nvcc` on the path may be a mere wrapper."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates += ["/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)]
    for candidate in filter(None, candidates):
        home = Path(candidate)
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def toolkit_major(home: Path) -> "str | None":
    """Major version of the toolkit, from the header that declares it: `#define CUDART_VERSION 13000`."""
    for line in (home / "include" / "cuda_runtime_api.h").read_text(errors="replace").splitlines():
        words = line.split()
        if words[:2] == ["#define", "CUDART_VERSION"]:
            return str(int(words[2]) // 1000)
    return None


def choose_cuda() -> "tuple[Path | None, str]":
    """Toolkit to build the CUDA operators with, or None, and the reason."""
    choice = setting("MEGALLM_CUDA")
    if choice == "0":
        return None, "MEGALLM_CUDA=0"
    home = find_cuda_toolkit()
    reason = ""
    if torch.version.hip:
        home, reason = None, "torch is built for ROCm"
    elif home is None:
        reason = "no CUDA toolkit found (bin/nvcc with include/cuda_runtime.h; CUDA_HOME names one)"
    elif torch.version.cuda and torch.version.cuda.split(".")[0] != toolkit_major(home):
        # The operators carry their own CUDA runtime: with another major version it may ask for a newer driver than
        # torch's.
        reason = f"the toolkit in {home} is CUDA {toolkit_major(home)}, torch uses CUDA {torch.version.cuda}"
        home = None
    if home is None and choice == "1":
        raise SystemExit(f"megallm: MEGALLM_CUDA=1, but the CUDA operators cannot be built: {reason}.")
    return home, reason


def operator_library(cuda: "Path | None") -> Extension:
    sources = [*ROOT.glob("csrc/bindings/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    if cuda:
        sources += ROOT.glob("csrc/cuda/*.cu")
    stable_abi = [f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}", "-DTORCH_STABLE_ONLY"]
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else ""
    # Another toolkit may allocate registers otherwise: where nobody asked, a slower kernel is better than none.
    strict = setting("MEGALLM_CUDA") == "1"
    # Nothing of the library needs libtorch before it is loaded, so the linker would drop it, and with it the weak
    # reference to the current CUDA stream, which would then be null on every torch.
    linker = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []
    return cpp_extension.CppExtension(
        "megallm._C",
        sorted(str(source.relative_to(ROOT)) for source in sources),
        py_limited_api=True,
        optional=setting("MEGALLM_NATIVE") != "1",
        define_macros=[("MEGALLM_CUDA_ARCHITECTURES", f'"{architectures}"')],
        include_dirs=[str(ROOT / "csrc")] + ([str(cuda / "include")] if cuda else []),
        # Where NVIDIA's installers put them, and where its Python packages do.
        library_dirs=[str(cuda / name) for name in ("lib64", "lib")] if cuda else [],
        libraries=["cudart_static", "rt", "dl", "pthread"] if cuda else [],
        extra_link_args=linker,
        extra_compile_args={
            # OpenMP only as loop annotations: threads are torch's own pool, so no second OpenMP runtime is linked.
            # Without errno and traps a root or a comparison does not keep a loop from being vectorised.
            "cxx": [
                *("-O3", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-g0"),
                *stable_abi,
            ],
            "nvcc": [
                *("-O3", "-lineinfo", "--threads", "2", "-Xcompiler", "-fvisibility=hidden", "-Xptxas", "-v"),
                *(("-Xptxas", "--warn-on-spills,--warn-on-local-memory-usage,-Werror") if strict else ()),
                *("-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_HALF2_OPERATORS__"),
                *("-U__CUDA_NO_BFLOAT16_CONVERSIONS__", *stable_abi),
            ],
        },
    )


def data_helpers() -> Extension:
    return Extension(
        "megallm.data.samples._helpers",
        sorted(str(source.relative_to(ROOT)) for source in ROOT.glob("csrc/data/*.cpp")),
        depends=["csrc/data/helpers.h"],
        language="c++",
        optional=setting("MEGALLM_NATIVE") != "1",
        include_dirs=[pybind11.get_include()],
        # A blend compares products of doubles whose ties are common. A fused multiply-add would round them differently
        # on machines that have one, and with that the order of the samples would depend on the machine.
        extra_compile_args=["-O3", "-fvisibility=hidden", "-g0", "-ffp-contract=off"],
    )


def extensions() -> list[Extension]:
    """What this machine can build, said in one line."""
    if setting("MEGALLM_NATIVE") == "0":
        say("builds nothing native: MEGALLM_NATIVE=0.")
        return []
    compiler = os.environ.get("CXX", "c++")
    if not runs(compiler):
        if setting("MEGALLM_NATIVE") == "1":
            raise SystemExit(f"megallm: MEGALLM_NATIVE=1, but there is no C++ compiler `{compiler}`.")
        say(f"BUILDS NOTHING NATIVE: there is no C++ compiler `{compiler}`. Everything works, slower.")
        return []
    cuda, why_not = choose_cuda()
    os.environ.setdefault("MAX_JOBS", "2")
    if cuda:
        cpp_extension.CUDA_HOME = str(cuda)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        say(
            "builds data helpers and operators for CPU and CUDA "
            f"({os.environ['TORCH_CUDA_ARCH_LIST']}, toolkit {cuda})."
        )
    else:
        say(f"builds data helpers and operators for CPU; none for CUDA: {why_not}.")
    return [operator_library(cuda), data_helpers()]


class BuildExtensions(cpp_extension.BuildExtension):
    """torch's builder of C++ and CUDA, which leaves out an optional extension that fails, its CUDA half first."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            has_cuda = any(source.endswith(".cu") for source in ext.sources)
            if not ext.optional or (has_cuda and setting("MEGALLM_CUDA") == "1"):
                raise
            if not has_cuda:
                say(f"LEFT OUT {ext.name}, which did not compile; everything works without it, slower. {error}")
                return
            say(f"LEFT OUT the CUDA operators, which did not compile; the CPU operators follow. {error}")
            ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
            ext.define_macros = [("MEGALLM_CUDA_ARCHITECTURES", '""')]
            ext.libraries = []
            self.build_extension(ext)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})
