"""Our pass over Inductor's graphs; Inductor caches these by the graph and its own sources, and the pass adds ours."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdelta_compile import kernels, lowering

FOLDERS = tuple(Path(package.__file__ or "").parent for package in (lowering, kernels))
_SLOT = "post_grad_custom_pre_pass"


@functools.cache
def source_digest() -> str:
    """SHA-256 over every file of lowering/ and kernels/ that can change generated code."""
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".py", ".h", ".jinja"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def graph_passes(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor options that put our pass over its graphs, and with it the digest into its cache key.

    It runs after the passes already configured, if any, and before Inductor turns additions into parts of matrix
    products.

    Args:
        patches: Inductor options that will be in force together with these.
    """
    from torch._inductor import config, custom_graph_pass

    from .fusion import fuse_base_and_delta

    configured = patches.get(_SLOT, getattr(config, _SLOT))
    passes = list(configured) if isinstance(configured, list | tuple) else [configured]
    passes = [each for each in passes if each is not None]
    graph_pass = custom_graph_pass.CustomGraphPass
    inference_aware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())

    class Passes(inference_aware or graph_pass):  # type: ignore[misc]
        def __call__(self, graph: Any, is_inference: bool = False) -> None:
            for each in passes:
                if inference_aware and isinstance(each, inference_aware):
                    each(graph, is_inference)
                else:
                    each(graph)
            fuse_base_and_delta(graph)

        def uuid(self) -> Any:
            uuids = [each.uuid() if isinstance(each, graph_pass) else None for each in passes]
            if any(each is None for each in uuids):
                return None  # Inductor does not cache graphs of a pass that cannot say what it is
            return (source_digest(), *map(str, uuids))

    return {_SLOT: Passes()}
