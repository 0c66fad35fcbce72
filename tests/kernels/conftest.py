"""C++ built for each instruction set of this machine."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdelta_compile import kernels

HEADERS = Path(kernels.__file__).parent
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
FLAGS: dict[str, list[str]] = {
    "PORTABLE": [],
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX512_BF16": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx512bf16"],
}
NEEDS: dict[str, set[str]] = {
    "PORTABLE": set(),
    "AVX2": {"avx2", "fma"},
    "AVX512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "AVX512_BF16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
}

Build = Callable[[str], ctypes.CDLL]


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    return next((set(line.split()) for line in info.read_text().splitlines() if line.startswith("flags")), set())


@pytest.fixture(scope="session")
def build_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ctypes.CDLL]:
    """`build_for(isa, source)`: C++ that may include kernels/*.h, compiled for that instruction set and loaded."""

    @functools.cache
    def call(isa: str, source: str) -> ctypes.CDLL:
        if COMPILER is None:
            pytest.skip("no C++ compiler")
        if not NEEDS[isa] <= _cpu_flags():
            pytest.skip(f"this CPU lacks {isa}")
        folder = tmp_path_factory.mktemp(isa)
        (folder / "source.cpp").write_text(source)
        define = f"-DBITDELTA_{isa.removesuffix('_BF16')}=1"
        options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fopenmp", *FLAGS[isa], define, f"-I{HEADERS}"]
        subprocess.run(
            [COMPILER, *options, "source.cpp", "-o", "built.so"], cwd=folder, check=True, capture_output=True
        )
        return ctypes.CDLL(str(folder / "built.so"))

    return call


@pytest.fixture(scope="module", params=sorted(FLAGS))
def build(request: pytest.FixtureRequest, build_for: Callable[[str, str], ctypes.CDLL]) -> Build:
    """`build(source)`: `build_for` each instruction set."""
    return functools.partial(build_for, request.param)
