"""What a machine has of the things this package needs: versions, a C++ compiler that works, a GPU, Inductor's cache."""

from __future__ import annotations

import dataclasses
import getpass
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SUPPORTED_TORCH = ((2, 11), (2, 15))
_PROGRAM = "#include <vector>\nint main() { std::vector<int> v(3, 1); return v[0] - 1; }\n"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Findings by name, and what is wrong in sentences: `problems` stop a compiled model, `warnings` do not."""

    findings: dict[str, str]
    problems: list[str]
    warnings: list[str]


def examine() -> Diagnosis:
    """Look at this machine. Runs the C++ compiler once on a tiny program."""
    import torch

    low, high = (".".join(map(str, version)) for version in SUPPORTED_TORCH)
    compiler, problem = _compiler()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    findings = {
        "bitdelta_compile": _version("bitdelta_compile"),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (supported: {low} to {high})",
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "C++ compiler": compiler or "none",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "GPU": ", ".join(gpus) or "none",
        "Inductor's cache": str(inductor_cache()),
    }
    warnings = []
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not SUPPORTED_TORCH[0] <= version <= SUPPORTED_TORCH[1]:
        warnings.append(f"torch {torch.__version__} is outside the supported range {low} to {high}")
    if gpus and importlib.util.find_spec("triton") is None:
        warnings.append("there is a GPU but no triton: install the build of torch that brings it")
    return Diagnosis(findings, [problem] if problem else [], warnings)


def inductor_cache() -> Path:
    """The folder in which Inductor keeps what it has compiled."""
    default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", default))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> tuple[str | None, str | None]:
    """The C++ compiler that Inductor finds ($CXX, then the usual names) and what is wrong with it, if anything."""
    named = os.environ.get("CXX")
    found = next((path for name in (named, "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)
    if found is None:
        return None, "there is no C++ compiler: install g++ or clang++, or point CXX at one"
    with tempfile.TemporaryDirectory() as scratch:
        source, program = Path(scratch, "check.cpp"), Path(scratch, "check")
        source.write_text(_PROGRAM)
        try:
            command = [found, "-std=c++17", "-O1", str(source), "-o", str(program)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            subprocess.run([str(program)], check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            stderr = getattr(error, "stderr", None)
            reason = str(stderr or error).strip().partition("\n")[0]
            return found, f"the C++ compiler {found} does not work: {reason}"
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    return f"{found} ({said.partition(chr(10))[0]})", None
