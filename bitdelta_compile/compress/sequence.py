"""Fitting in execution order: every matrix to the inputs that it meets once all before it are compressed.

The tuned and the compressed model run on every batch side by side (`streams`); at each matrix all of them stand still,
their inputs give its metric, it is fitted, and they go on with it. One matrix's statistics are in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CalibrationError
from .metric import Moments
from .streams import Ended, Run, Stream, Substitution, return_memory
from .survey import Survey
from .uses import Use
from .weights import FittedValues, TunedValues

LARGEST = 1e15  # of an input: sums of squares of larger ones may leave fp32


class Arrival:
    """All streams before one matrix.

    Attributes:
        name: of the matrix.
        looked_up: by ids, int64 tensors; else multiplied.
        fresh: whether the inputs are others than those of the arrival before.
    """

    def __init__(self, name: str, pairs: Sequence[tuple[Stream | None, Stream]], fresh: bool) -> None:
        self.name = name
        self.fresh = fresh
        self._pairs = pairs
        self.bias = next((stream.use.bias for _, stream in pairs if stream.use is not None), None)
        self.looked_up = any(stream.use is not None and stream.use.kind == "embedding" for _, stream in pairs)

    def ids(self) -> Tensor:
        """Every id looked up, without those of tokens that the batch masks, int64."""
        found = [torch.empty(0, dtype=torch.int64)]
        for _, stream in self._pairs:
            ids = stream.use.operand if stream.use is not None and stream.use.kind == "embedding" else None
            if ids is not None and not ids.is_meta:
                mask = stream.run.mask
                found.append((ids[mask] if mask is not None and mask.shape == ids.shape else ids).flatten().cpu())
        return torch.cat(found).long()

    def moments(self, features: int) -> Moments:
        """Of the compressed model's inputs, and of the tuned model's beside them.

        Raises:
            CalibrationError: inputs hold NaN or infinite values.
        """
        found: Moments | None = None
        for tuned, stream in self._pairs:
            x = _inputs(stream, features)
            if x is None:
                continue
            reference = None if tuned is None else _inputs(tuned, features)
            if reference is not None and reference.shape != x.shape:
                reference = None
            found = found or Moments(features, x.device)
            found.add(x, reference)
        return found or Moments(features, torch.device("cpu"))


def _inputs(stream: Stream, features: int) -> Tensor | None:
    return None if stream.use is None else flat_inputs(stream.use, stream.run, features)


def flat_inputs(use: Use, run: Run, features: int) -> Tensor | None:
    """The inputs [t, K] of a product, without those of tokens that the batch masks; None of a lookup.

    Raises:
        CalibrationError: they hold NaN or infinite values, or such as have no square in fp32.
    """
    x = use.operand
    if x is None or use.kind != "linear" or x.is_meta:
        return None
    x = x.detach()
    rows, mask = x.reshape(-1, features), run.mask
    if mask is not None and mask.numel() == rows.shape[0] and (x.dim() == 2 or x.shape[:2] == mask.shape):
        rows = rows[mask.flatten()]
    if not bool((rows.abs() < LARGEST).all()):
        raise CalibrationError(
            f"{use.name}: the inputs it meets on the calibration data hold NaN, infinite or enormous values "
            f"({LARGEST:g} or more); run the tuned model in fp32 or bf16, or give other calibration data"
        )
    return rows


def collect(
    runs: Sequence[Run], handles: Mapping[str, Tensor], values: TunedValues, features: Mapping[str, int], seen: Survey
) -> dict[str, Moments]:
    """The inputs that some matrices meet in the tuned model, over whole runs.

    For matrices that a run uses more than once: what they will meet later is not known when the streams first reach
    them.
    """
    found: dict[str, Moments] = {}
    last = seen.usage[seen.last].multiplied + seen.usage[seen.last].looked_up if seen.last is not None else 0

    def watch(run: Run) -> None:
        met = 0

        def on_use(use: Use) -> None:
            nonlocal met
            x = flat_inputs(use, run, features[use.name]) if use.name in features else None
            if x is not None:
                found.setdefault(use.name, Moments(features[use.name], x.device)).add(x)
            met += use.name == seen.last
            if met == last:  # nothing is left to see: what the model makes of it is not computed
                raise Ended

        with contextlib.suppress(Ended), torch.no_grad(), Substitution(handles, on_use, values):
            run.call()

    for run in runs if features else ():
        watch(run)
    return found


def arrivals(
    runs: Sequence[Run],
    handles: Mapping[str, Tensor],
    pending: set[str],
    tuned: TunedValues,
    compressed: FittedValues | None,
    refuse: Callable[[Use], None],
) -> Iterator[Arrival]:
    """Each pending matrix in turn, as the streams reach it; whoever iterates takes it out of `pending`.

    Args:
        compressed: what the second stream of each batch computes with; None: there is only the tuned model's.
        refuse: called with uses that sign planes cannot stand for.
    """

    def stops(use: Use) -> bool:
        if use.kind == "other":
            refuse(use)
            return False
        return use.name in pending

    references = [Stream(run, handles, tuned, stops) for run in runs]
    followers = [] if compressed is None else [Stream(run, handles, compressed, stops) for run in runs]
    pairs: list[tuple[Stream | None, Stream]] = (
        list(zip(references, followers, strict=True)) if followers else [(None, stream) for stream in references]
    )
    streams = [*references, *followers]
    held: list[tuple[Tensor | None, int]] = []
    try:
        active = list(streams)
        while pending and active:
            for stream in active:
                if stream.use is None or stream.use.name not in pending:
                    stream.advance()
            active = [stream for stream in active if stream.use is not None]
            first = next((stream.use for stream in active), None)
            if first is None:
                return
            there = [(one, two) for one, two in pairs if two.use is not None and two.use.name == first.name]
            there = [(one if one and one.use and one.use.name == first.name else None, two) for one, two in there]
            if not there:  # only the tuned model came this way
                there = [(None, stream) for stream in references if stream.use and stream.use.name == first.name]
            inputs = [_version(stream.use) for _, stream in there if stream.use is not None]
            same = len(inputs) == len(held) and all(
                a is b and v == w for (a, v), (b, w) in zip(inputs, held, strict=True)
            )
            held = inputs
            if not same:
                tuned.forget()
                if compressed is not None:
                    compressed.forget()
                return_memory()
            yield Arrival(first.name, there, not same)
    finally:
        for stream in streams:
            stream.dismiss()  # all, even where waiting for them is interrupted
        for stream in streams:
            stream.end()


def _version(use: Use) -> tuple[Tensor | None, int]:
    """Equal for two uses of one input that was not written to in between."""
    return use.operand, 0 if use.operand is None or use.operand.is_inference() else use.operand._version
