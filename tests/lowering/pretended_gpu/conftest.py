"""Inductor made to believe in a GPU: it keeps that for the life of a process, so these tests have one of their own.

See tests/lowering/test_pretended_gpu.py.
"""

from __future__ import annotations

import os

if os.environ.get("PRETEND_GPU") != "1":
    collect_ignore_glob = ["*"]
