"""Inductor caches compiled graphs by the graph and its own sources; this puts our sources into the key."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdelta_compile import kernels, lowering

FOLDERS = tuple(Path(package.__file__ or "").parent for package in (lowering, kernels))
_SLOT = "post_grad_custom_post_pass"


@functools.cache
def source_digest() -> str:
    """SHA-256 over every file of lowering/ and kernels/ that can change generated code."""
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".py", ".h", ".jinja"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def stamp(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor options that add the digest to its cache key: a pass that runs the one already configured, if any."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    configured = patches.get(_SLOT, getattr(config, _SLOT))

    class SourceStamp(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            for inner in configured if isinstance(configured, list | tuple) else [configured]:
                if inner is not None:
                    inner(graph)

        def uuid(self) -> Any:
            inner = configured if isinstance(configured, list | tuple) else [configured]
            uuids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in inner if each is not None]
            if any(each is None for each in uuids):
                return None  # Inductor does not cache graphs of a pass that cannot say what it is
            return (source_digest(), *map(str, uuids))

    return {_SLOT: SourceStamp()}
