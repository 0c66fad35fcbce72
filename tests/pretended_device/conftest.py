"""A device can be added to a process and not taken away again: these tests have a process of their own.

See tests/test_pretended_device.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

if os.environ.get("PRETEND_DEVICE") != "1":
    collect_ignore_glob = ["*"]
else:
    spec = importlib.util.spec_from_file_location("pretended", Path(__file__).with_name("pretended.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["pretended"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.add_device()
