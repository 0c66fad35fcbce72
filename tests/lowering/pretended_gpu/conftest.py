"""Inductor made to believe in a GPU: it keeps that for the life of a process, so these tests have one of their own.

See tests/lowering/test_pretended_gpu.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

if os.environ.get("PRETEND_GPU") != "1":
    collect_ignore_glob = ["*"]
elif importlib.util.find_spec("triton") is not None:
    for name in ("without_gpu", "ahead_of_time", "problems"):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
