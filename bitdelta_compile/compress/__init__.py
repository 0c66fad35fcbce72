"""Compress a fine-tune against its base: base + tuned -> `Delta`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import quantized, released
from ..checkpoint import Checkpoint, match_names, open_checkpoint
from ..delta import Delta
from ..errors import BaseMismatchError, UnsupportedError
from ..fingerprint import Fingerprint
from ..progress import Progress
from .budget import limit, within
from .calibrate import check_amount
from .configs import check_buffers, check_configs
from .encode import check_values, encode, unrelated
from .precision import full_precision
from .settings import FIT, RECIPES, Allocation, Method, Quality, Settings
from .workdir import WorkDir
from .workload import Workload, digest_of, prepare

__all__ = ["RECIPES", "Allocation", "Settings", "compress", "encode"]

log = logging.getLogger(__name__)


@full_precision()
def compress(
    base: nn.Module | str | Path,
    tuned: nn.Module | str | Path,
    calibration: Iterable[Any] | str | None = None,
    *,
    quality: Quality = "best",
    method: Method | None = None,
    planes: int = 1,
    rank: int = 0,
    tokens: int | None = None,
    sampled: int = 0,
    seed: int = 0,
    temperature: float = 1.0,
    allocation: Mapping[str, Allocation] | None = None,
    bits: float | None = None,
    max_bytes: int | None = None,
    work_dir: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Delta:
    """Compress `tuned` to a delta against `base`.

    Args:
        base, tuned: loaded modules, checkpoint folders, or hub ids. Weights of folders stay in their files.
        calibration: what both models run on: texts, conversations (lists of messages, written out by the tokenizer's
            chat template), or mappings of forward arguments, which all run side by side: a few large ones rather than
            many small. None: tokens that the tuned model writes where it is a causal language model, random ones
            elsewhere, drawn by Zipf's law.
        quality: `fast`, `balanced` or `best`: see `RECIPES` for what each does and costs.
        method: instead of the quality's own: `sequential`, `closed_form`, or `mean_abs`, one scale per matrix from the
            weights (BitDelta's start, arXiv 2402.10193), for which folders are read tensor by tensor.
        planes: bits per weight, 1 to 4.
        rank: of the low-rank part, fitted after the signs but in tables that moved far.
        tokens: of calibration; the quality's own number by default.
        sampled: tokens that a causal language model writes itself and reads beside the calibration given, which may
            then be of another domain than what will be served.
        seed: of random and sampled tokens.
        temperature: of sampled tokens.
        allocation: by parameter name of the tuned model: encoding, planes and rank of matrices that are not to have
            what the others have.
        bits, max_bytes: of the file, per weight of the tuned model or in all, never exceeded: what each matrix gets is
            then decided by what its delta does to the model's outputs, instead of by planes, rank and allocation.
        work_dir: a folder in which every fitted matrix is kept: an interrupted call, repeated, goes on from there and
            gives the same file.
        device: where the models compute and matrices are fitted, by default where the tuned model is. Weights are put
            there one at a time, from wherever they are: models may be larger than its memory.
        progress: called with (stage, done, total), the stages being `sample` (tokens) and `fit` (matrices); with a
            budget also `offer` (sizes that matrices may have) and `measure` (matrices).

    Returns:
        The delta; `report["parameters"][name]["error"]` is the relative error of that matrix's part of the output.

    Raises:
        BaseMismatchError: no parameter in common, another graph (config, buffers), or weights unrelated to the base's.
        BitDeltaError: NaN or infinite weights.  CalibrationError: calibration that is empty or gives NaN.
        CheckpointError: a source that cannot be read.
        UnsupportedError: an option out of range, a budget that no delta fits in (the message names the smallest), a
            compiled model whose tuned weights were let go, `sampled` of a model that writes nothing, or a `work_dir`
            that holds other work.
    """
    settings = _settings(quality, method, planes, rank, allocation)
    recipe = RECIPES[quality]
    drawn = recipe.random_tokens if tokens is None else tokens
    tokens = recipe.tokens if tokens is None else tokens
    check_amount(tokens, seed)
    if not isinstance(sampled, int) or sampled < 0:
        raise UnsupportedError(f"sampled must be an integer, 0 or more, got {sampled!r}")
    if sampled and settings.method == "mean_abs":
        raise UnsupportedError("mean_abs reads no tokens: leave sampled out, or choose another method")
    if sampled and calibration is None:
        raise UnsupportedError(
            "sampled tokens stand beside texts (--text) or batches: give some, or leave sampled out; without them all "
            "tokens are sampled, as many as tokens says"
        )
    place = _place(device)
    for module in (base, tuned):
        if isinstance(module, nn.Module):
            released.refuse(module.named_parameters())
    if isinstance(tuned, nn.Module):
        quantized.refuse(tuned.named_parameters())
    ours, theirs = open_checkpoint(base), open_checkpoint(tuned)
    names = match_names(theirs.names(), [*ours.names(), *ours.tied])
    if not any(ours.shape(there) == theirs.shape(name) for name, there in names.items()):
        raise BaseMismatchError(
            f"{theirs.source} and {ours.source} have no parameter in common (same name and shape): "
            "give the model that was fine-tuned as the base"
        )
    _check_ties(ours, theirs)
    check_configs(ours, theirs)
    if isinstance(base, nn.Module) and isinstance(tuned, nn.Module):
        check_buffers(base, tuned, names)
    _check_integers(ours, theirs, names)
    if unknown := settings.allocation.keys() - set(theirs.names()):
        raise UnsupportedError(f"allocation names {min(unknown)}, which {theirs.source} does not have")
    before = quantized.Values({name: ours.held(there) for name, there in names.items()})
    after = {name: theirs.tensor(name) for name in theirs.names()}
    check_values(before, after)
    room = limit(bits, max_bytes, {name: theirs.shape(name) for name in theirs.names()})
    if room is not None and allocation:
        raise UnsupportedError("a budget decides what every matrix gets: give either allocation, or bits or max_bytes")
    options: dict[str, Any] = {"quality": quality, "planes": planes, "rank": rank, "tokens": tokens, "seed": seed}
    options |= {"temperature": temperature, "threads": torch.get_num_threads()}
    options |= {} if room is None else {"max_bytes": room}
    options |= {} if place is None else {"device": place.type}
    options |= {"sampled": sampled} if sampled else {}
    if work_dir is not None:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
    keep = None if work_dir is None else Path(work_dir)
    workload = prepare(
        tuned, theirs, calibration, settings.method, tokens=tokens, random_tokens=drawn, sampled=sampled, seed=seed,
        temperature=temperature, keep=keep, progress=progress, device=place,
    )  # fmt: skip
    options |= {"method": settings.method, "calibration": workload.data}
    options["tokens"] = drawn if workload.data == "random" else tokens

    def make(settings: Settings, folder: Path | None) -> Delta:
        encodings, figures = encode(
            before,
            after,
            workload.runs,
            settings,
            handles=workload.handles,
            device=place,
            copy=isinstance(tuned, nn.Module),
            checked=True,
            work=None if folder is None else WorkDir(folder, _task(ours, theirs, options, settings, workload)),
            progress=progress,
        )
        return Delta.of(ours, theirs, encodings, options=options, report={"parameters": figures})

    with workload.evaluation():
        if room is not None:
            return within(room, make, before, after, workload, settings, keep, progress)
        delta = make(settings, keep)
    figures: Any = delta.report["parameters"]
    if dense := unrelated(delta.encodings, figures, settings):
        raise BaseMismatchError(
            f"none of the {len(dense)} matrices of {theirs.source} is near that of {ours.source}: "
            "it is no fine-tune of this base; give the model that was fine-tuned"
        )
    if all(encoding.kind == "same" for encoding in delta.encodings.values()):
        log.warning("%s equals its base %s: the delta changes nothing", theirs.source, ours.source)
    return delta


def _place(device: torch.device | str | None) -> torch.device | None:
    """A device that tensors can be on.

    Raises:
        UnsupportedError: there is none of that name here.
    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UnsupportedError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}): give one that torch has on this "
            "machine, or none"
        ) from None


def _check_ties(ours: Checkpoint, theirs: Checkpoint) -> None:
    """One delta cannot stand for two tensors, of which quantizing has changed one."""
    pairs = match_names([*theirs.names(), *theirs.tied], [*ours.names(), *ours.tied])
    for alias, name in theirs.tied.items():
        both = [ours.held(pairs[each]) for each in (alias, name) if each in pairs]
        if len(both) == 2 and both[0] is not both[1] and any(map(quantized.is_quantized, both)):
            raise UnsupportedError(
                f"{alias} and {name} are one tensor in {theirs.source} and two in the base, where one is quantized: "
                f"leave {alias} out when quantizing, or give the fine-tune a copy of its own there"
            )


def _settings(
    quality: Quality,
    method: Method | None,
    planes: int,
    rank: int,
    allocation: Mapping[str, Allocation] | None,
) -> Settings:
    """The settings of a quality, with what the caller wants otherwise.

    Raises:
        UnsupportedError: an option out of range.
    """
    if quality not in RECIPES:
        raise UnsupportedError(f"quality must be one of {', '.join(RECIPES)}, got {quality!r}")
    recipe = RECIPES[quality]
    try:
        return Settings(
            recipe.method if method is None else method,
            planes,
            rank,
            passes=max(1, recipe.passes),
            sweeps=recipe.sweeps,
            allocation=dict(allocation or {}),
        )
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def _task(
    ours: Checkpoint, theirs: Checkpoint, options: Mapping[str, Any], settings: Settings, workload: Workload
) -> dict[str, object]:
    """What a work folder is for: equal for calls that give the same file."""
    allocation = {name: dataclasses.astuple(given) for name, given in sorted(settings.allocation.items())}
    dtypes = [{name: str(each.dtype(name)) for name in each.names()} for each in (ours, theirs)]
    return {
        "base": Fingerprint.of(ours).digest,
        "tuned": Fingerprint.of(theirs).digest,
        "dtypes": digest_of(dtypes),
        "device": workload.place.type,
        "calibration": workload.digest,
        "options": dict(options),
        "allocation": json.loads(json.dumps(allocation)),
        "torch": torch.__version__,
        "fit": FIT,
    }


def _check_integers(ours: Checkpoint, theirs: Checkpoint, names: Mapping[str, str]) -> None:
    """Integer tensors are tables of the graph (position ids) or quantized weights: neither has a delta."""
    for name, there in names.items():
        if ours.dtype(there).is_floating_point and theirs.dtype(name).is_floating_point:
            continue
        mine, other = ours.tensor(there), theirs.tensor(name)
        if mine.shape != other.shape or not torch.equal(mine.to(other.device, other.dtype), other):
            raise BaseMismatchError(
                f"{name} is not floating point ({other.dtype}, the base's {mine.dtype}) and differs from the base's: "
                "only floating-point weights have deltas; give unquantized checkpoints of one architecture"
            )
