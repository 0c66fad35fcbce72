"""A device can be added to a process and not taken away again: these tests have a process of their own.

See tests/compress/test_pretended_device.py.
"""

from __future__ import annotations

import os

if os.environ.get("PRETEND_DEVICE") != "1":
    collect_ignore_glob = ["*"]
