"""Compress a fine-tune against its base: base + tuned -> `Delta`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import released
from ..checkpoint import Checkpoint, match_names, open_checkpoint
from ..delta import Delta
from ..errors import BaseMismatchError, UnsupportedError
from ..progress import Progress
from .calibrate import check_amount
from .configs import check_buffers, check_configs
from .encode import Method, Settings, encode, matrices_all_dense
from .workload import prepare

__all__ = ["Settings", "compress", "encode"]

log = logging.getLogger(__name__)


def compress(
    base: nn.Module | str | Path,
    tuned: nn.Module | str | Path,
    calibration: Iterable[str] | Iterable[Mapping[str, Any]] | None = None,
    *,
    method: Method = "closed_form",
    planes: int = 1,
    rank: int = 0,
    tokens: int = 2048,
    seed: int = 0,
    progress: Progress | None = None,
) -> Delta:
    """Compress `tuned` to a delta against `base`.

    Args:
        base, tuned: loaded modules, checkpoint folders, or hub ids.
        calibration: what the tuned model runs on to fit scales: None (random tokens), texts, or mappings of forward
            arguments.
        method: `closed_form` (least squares on the layers' inputs), or `mean_abs`: one scale per matrix from the
            weights (BitDelta's start, arXiv 2402.10193); folders are then read tensor by tensor, no model is loaded.
        planes: bits per weight, 1 to 4.  rank: of the low-rank part fitted after the signs.
        tokens: of random or text calibration.  seed: of random tokens.
        progress: called with (stage, done, total).

    Returns:
        The delta; `report["parameters"][name]["error"]` is the relative error of that matrix's part of the output.

    Raises:
        BaseMismatchError: no parameter in common, another graph (config, buffers), or weights unrelated to the base's.
        BitDeltaError: NaN or infinite weights.  CalibrationError: calibration that is empty or gives NaN.
        CheckpointError: a source that cannot be read.
        UnsupportedError: an option out of range, or a compiled model whose tuned weights were let go.
    """
    try:
        settings = Settings(method, planes, rank)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    check_amount(tokens, seed)
    for module in (base, tuned):
        if isinstance(module, nn.Module):
            released.refuse(module.named_parameters())
    ours, theirs = open_checkpoint(base), open_checkpoint(tuned)
    names = match_names(theirs.names(), [*ours.names(), *ours.tied])
    if not any(ours.shape(there) == theirs.shape(name) for name, there in names.items()):
        raise BaseMismatchError(
            f"{theirs.source} and {ours.source} have no parameter in common (same name and shape): "
            "give the model that was fine-tuned as the base"
        )
    check_configs(ours, theirs)
    if isinstance(base, nn.Module) and isinstance(tuned, nn.Module):
        check_buffers(base, tuned, names)
    _check_integers(ours, theirs, names)
    workload = prepare(tuned, theirs, calibration, settings, tokens=tokens, seed=seed, progress=progress)
    encodings, figures = encode(
        {name: ours.tensor(there) for name, there in names.items()},
        {name: theirs.tensor(name) for name in theirs.names()},
        workload.forward,
        settings,
        handles=workload.handles,
        copy=isinstance(tuned, nn.Module),
        progress=progress,
    )
    if dense := matrices_all_dense(encodings, settings):
        raise BaseMismatchError(
            f"none of the {len(dense)} matrices of {theirs.source} is near that of {ours.source}: "
            "it is no fine-tune of this base; give the model that was fine-tuned"
        )
    if all(encoding.kind == "same" for encoding in encodings.values()):
        log.warning("%s equals its base %s: the delta changes nothing", theirs.source, ours.source)
    options: dict[str, Any] = {"method": method, "planes": planes, "rank": rank, "tokens": tokens, "seed": seed}
    fitted = settings.method == "closed_form" and workload.forward is not None
    options["calibration"] = "none" if not fitted else "random" if calibration is None else "given"
    return Delta.of(ours, theirs, encodings, options=options, report={"parameters": figures})


def _check_integers(ours: Checkpoint, theirs: Checkpoint, names: Mapping[str, str]) -> None:
    """Integer tensors are tables of the graph (position ids) or quantized weights: neither has a delta."""
    for name, there in names.items():
        mine, other = ours.tensor(there), theirs.tensor(name)
        if mine.is_floating_point() and other.is_floating_point():
            continue
        if mine.shape != other.shape or not torch.equal(mine.to(other.device, other.dtype), other):
            raise BaseMismatchError(
                f"{name} is not floating point ({other.dtype}, the base's {mine.dtype}) and differs from the base's: "
                "only floating-point weights have deltas; give unquantized checkpoints of one architecture"
            )
