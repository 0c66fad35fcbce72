"""Scale distillation, BitDelta's own method (arXiv 2402.10193, section 3.1), from any start.

Signs, low-rank parts and whatever is stored outright stay as they are; the scales of the sign planes are trained by
Adam until base + delta gives what the tuned model gives: the mean squared error of its logits, or of the hidden states
of a model without a head. The base is frozen, and gradients run through the delta path only.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import released
from ..checkpoint import match_names, open_checkpoint
from ..delta import Delta
from ..encodings import Rows, Sign
from ..errors import BaseMismatchError, BitDeltaError, UnsupportedError
from ..fidelity import load_model
from ..fingerprint import Fingerprint
from ..progress import Progress
from .calibrate import Batch, device_of
from .deltapath import DeltaPath, Per, TrainedSign
from .teacher import Teacher, make_samples, outputs
from .workdir import WorkDir
from .workload import digest_of

log = logging.getLogger(__name__)

LEARNING_RATE = 1e-4  # as published
_EPSILON = 1e-8
_DIVERGED = 10.0  # times the start's loss
_ADAM = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of each parameter

# By name, each parameter under sign planes, and those planes.
_Planes = Mapping[str, tuple[Tensor, TrainedSign]]


def distill(
    base: nn.Module | str | Path,
    tuned: nn.Module | str | Path,
    delta: Delta | None = None,
    calibration: Iterable[str] | Iterable[Mapping[str, Any]] | None = None,
    *,
    steps: int = 200,
    batch: int = 4,
    length: int = 128,
    learning_rate: float = LEARNING_RATE,
    relative: bool = False,
    per: Per = "matrix",
    seed: int = 0,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Delta:
    """Train the scales of a delta so that base + delta gives what `tuned` gives. The defaults are the paper's.

    Every step runs both models on one batch, and base + delta backwards; a batch that comes again finds the tuned
    model's outputs in a temporary file, 4 bytes for each number (for 800 samples of 128 tokens and a vocabulary of
    50,000 that would be 20 GB: only what comes again is kept). Memory: both models in fp32, one byte for each sign.

    Args:
        base, tuned: loaded modules, checkpoint folders, or hub ids.
        delta: where to start; None starts as the paper does, from mean |d| per matrix.
        calibration: texts, mappings of forward arguments, or None: as in `compress`. Texts are cut into batches of
            `batch` rows of `length` tokens; language models read them end to end.
        steps, batch, length: of training. Calibration that gives fewer batches is gone through again.
        learning_rate: of Adam; `relative` makes it a share of each matrix's mean scale.
        per: train one factor for each plane of a `matrix`, or one for each `row` of it.
        seed: of the order of texts, and of sampled or random tokens.
        work_dir: a folder in which every step is kept: an interrupted call, repeated, goes on from there and gives the
            same delta.
        progress: called with (stage, done, total).

    Returns:
        A new delta; the one given is not touched. `report["distillation"]` has the loss at either end, means over a
        tenth of the steps.

    Raises:
        BitDeltaError: training diverged.
        BaseMismatchError: the delta is not of this base, or holds parameters that the model does not have.
        CalibrationError: calibration that is empty, that the model does not take, or on which it gives NaN.
        UnsupportedError: an option out of range, a delta without sign planes, a model whose output is neither logits
            nor hidden states, or a `work_dir` that holds other work.
    """
    _check_options(steps, batch, length, learning_rate, per)
    for module in (base, tuned):
        if isinstance(module, nn.Module):
            released.refuse(module.named_parameters())
    if delta is None:
        from . import compress

        delta = compress(base, tuned, method="mean_abs", progress=progress)
    teacher = tuned if isinstance(tuned, nn.Module) else load_model(tuned)[0]
    samples = make_samples(
        teacher, tuned, calibration, steps=steps, batch=batch, length=length, seed=seed, progress=progress
    )
    student = copy.deepcopy(teacher).float().eval().requires_grad_(False)
    planes = _set_up(student, base, delta, per)
    if not planes:
        raise UnsupportedError("the delta has no sign plane, so there are no scales to train: compress with planes=1")
    options = {"steps": steps, "batch": batch, "length": length, "rate": learning_rate, "per": per, "seed": seed}
    work = None
    if work_dir is not None:
        begun_with = {"tuned": _fingerprint(tuned), "start": _digest_of_encodings(delta)}
        begun_with |= {"calibration": digest_of(samples), "base": _fingerprint(base)}
        begun_with |= {"device": device_of(teacher).type, "dtype": str(next(teacher.parameters()).dtype)}
        task = {**options, **begun_with, "relative": relative, "threads": torch.get_num_threads()}
        work = WorkDir(Path(work_dir) / "distillation", {**task, "torch": torch.__version__})
    losses = _train(teacher, student, planes, samples, steps, learning_rate, relative, work, progress)
    end = max(1, steps // 10)
    first, last = (sum(part) / len(part) for part in (losses[:end], losses[-end:]))
    log.info("distillation: loss %.4g -> %.4g in %d steps", first, last, steps)
    encodings = dict(delta.encodings)
    for name, (_, trained) in planes.items():
        scale, encoding = trained.row_scale.detach().cpu().contiguous(), delta.encodings[name]
        if isinstance(encoding, Rows) and encoding.over is not None:
            encodings[name] = dataclasses.replace(encoding, over=dataclasses.replace(encoding.over, row_scale=scale))
        else:
            encodings[name] = dataclasses.replace(trained.sign, row_scale=scale)
    return dataclasses.replace(
        delta,
        encodings=encodings,
        options={**delta.options, "distilled": ", ".join(f"{name} {value}" for name, value in options.items())},
        report={**delta.report, "distillation": {"loss_start": first, "loss_end": last}},
    )


def _check_options(steps: int, batch: int, length: int, learning_rate: float, per: str) -> None:
    for name, value in (("steps", steps), ("batch", batch), ("length", length)):
        if not isinstance(value, int) or value < 1:
            raise UnsupportedError(f"{name} must be an integer of at least 1, got {value!r}")
    if not 0 < learning_rate < 1:
        raise UnsupportedError(f"learning_rate must be between 0 and 1, got {learning_rate!r}")
    if per not in ("matrix", "row"):
        raise UnsupportedError(f"per must be 'matrix' or 'row', got {per!r}")


def _set_up(
    student: nn.Module, base: nn.Module | str | Path, delta: Delta, per: Per
) -> dict[str, tuple[Tensor, TrainedSign]]:
    """Give the student the base's values where the delta has sign planes, else the tuned ones.

    Rows stored outright have their values, and planes that give them nothing; a table that grew is left as it is.

    Returns:
        By name, each parameter under sign planes, and those planes.
    """
    checkpoint = open_checkpoint(base)
    delta.fingerprint.check(checkpoint)
    of_base = match_names(delta.encodings, [*checkpoint.names(), *checkpoint.tied])
    parameters = dict(student.named_parameters(remove_duplicate=False))
    of_student = match_names([*delta.encodings, *delta.tied], parameters)
    places: dict[str, str] = {}
    for name, there in of_student.items():
        places.setdefault(delta.tied.get(name, name), there)
    found: dict[str, tuple[Tensor, TrainedSign]] = {}
    for name, encoding in delta.encodings.items():
        place = places.get(name)
        if place is None:
            if encoding.kind == "sign":
                raise BaseMismatchError(
                    f"{name} has sign planes, and the {type(student).__name__} that runs has no such parameter: "
                    "give the tuned model as a loaded module that has all of it"
                )
            continue
        value = checkpoint.tensor(of_base[name]) if name in of_base else torch.empty(0)
        parameter = parameters[place]
        if isinstance(encoding, Rows) and encoding.over is not None and encoding.over.shape == encoding.shape:
            value, sign = _outright(encoding, value)
            found[name] = (parameter, TrainedSign(sign, per, parameter.device))
        elif not isinstance(encoding, Sign):
            value = encoding.apply(value)
        else:
            found[name] = (parameter, TrainedSign(encoding, per, parameter.device))
        if value.shape != parameter.shape:
            raise BaseMismatchError(
                f"{name} has shape {list(value.shape)} in base + delta and {list(parameter.shape)} in the tuned model: "
                "give the fine-tune that this delta stands for"
            )
        parameter.copy_(value)
    return found


def _outright(encoding: Rows, base: Tensor) -> tuple[Tensor, Sign]:
    """The base's value with the listed rows in it, and planes that add nothing to them."""
    over = encoding.over
    assert over is not None
    scale = over.row_scale.index_fill(1, encoding.index, 0)
    left = None if over.left is None else over.left.index_fill(0, encoding.index, 0)
    value = dataclasses.replace(encoding, over=None).apply(base.detach())
    return value, dataclasses.replace(over, row_scale=scale, left=left)


def _train(
    teacher: nn.Module,
    student: nn.Module,
    planes: _Planes,
    samples: Sequence[Batch],
    steps: int,
    learning_rate: float,
    relative: bool,
    work: WorkDir | None,
    progress: Progress | None,
) -> list[float]:
    """Train the factors of the planes; the loss of every step."""
    # Adam on a scale that starts at s is Adam on its factor with the rate over s and epsilon times s.
    groups = [
        {
            "params": [trained.factor],
            "lr": learning_rate / (1 if relative else trained.size),
            "eps": _EPSILON * trained.size,
        }
        for _, trained in planes.values()
        if trained.size
    ]
    optimizer = torch.optim.Adam(groups)
    losses = _resume(work, planes, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        expected = Teacher(teacher, samples, steps, Path(folder))
        for step in range(len(losses), steps):
            wanted = expected(step)
            with DeltaPath(planes.values()):
                loss = (outputs(student, samples[step % len(samples)]) - wanted).square_().mean()
                loss.backward()
            losses.append(float(loss.detach()))
            if not losses[-1] <= _DIVERGED * losses[0]:
                raise BitDeltaError(
                    f"distillation diverged: the loss is {losses[-1]:.3g} at step {step} and was {losses[0]:.3g} at "
                    f"the first; use a learning rate below {learning_rate:g}"
                )
            optimizer.step()
            optimizer.zero_grad()
            if work is not None:
                work.store_state(_state(planes, optimizer), losses)
            if progress is not None:
                progress("distill", step + 1, steps)
    return losses


def _state(planes: _Planes, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """The factors and what Adam knows of them, by the parameter's name; contiguous, on the CPU."""
    found: dict[str, Tensor] = {}
    for name, (_, trained) in planes.items():
        found[f"factor.{name}"] = trained.factor.detach()
        found |= {f"{key}.{name}": value for key, value in optimizer.state.get(trained.factor, {}).items()}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def _resume(work: WorkDir | None, planes: _Planes, optimizer: torch.optim.Adam) -> list[float]:
    """Put back what was kept; the losses of the steps that it had taken."""
    kept = None if work is None else work.load_state()
    if kept is None:
        return []
    tensors, losses = kept
    for name, (_, trained) in planes.items():
        trained.factor.copy_(tensors[f"factor.{name}"])
        known = {key: tensors[f"{key}.{name}"].clone() for key in _ADAM if f"{key}.{name}" in tensors}
        if known:  # as of the start, the step count stays on the CPU
            optimizer.state[trained.factor] = {
                key: value if key == "step" else value.to(trained.factor.device) for key, value in known.items()
            }
    return losses


def _fingerprint(source: nn.Module | str | Path) -> str:
    return Fingerprint.of(open_checkpoint(source)).digest


def _digest_of_encodings(delta: Delta) -> str:
    found: list[dict[str, Any]] = []
    for name, encoding in sorted(delta.encodings.items()):
        found.append({"name": name, "layout": encoding.layout, **encoding.tensors()})
        if isinstance(encoding, Rows) and encoding.over is not None:
            found.append(encoding.over.tensors())
    return digest_of(found)
