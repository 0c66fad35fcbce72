"""Run generated CUDA code on CPU tensors: `TRITON_INTERPRET=1 python run_generated.py FOLDER`.

FOLDER holds, for each name, `name.py`, what Inductor generated, and `name.pt`, its inputs; `name.out.pt` is written.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

TESTS = Path(__file__).parents[2]


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main(folder: Path) -> None:
    import triton.runtime.interpreter as interpreter

    emulated = loaded(TESTS / "kernels" / "interpreted" / "conftest.py")._emulate
    without_gpu = loaded(Path(__file__).with_name("without_gpu.py"))
    interpreter.InterpreterBuilder.create_inline_asm = emulated  # type: ignore[attr-defined]
    for path in sorted(folder.glob("*.pt")):
        inputs = torch.load(path, weights_only=True)
        results = [without_gpu.run(path.with_suffix(".py").read_text(), each) for each in inputs]
        torch.save(results, path.with_suffix(".out"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
