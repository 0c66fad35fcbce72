"""From two sets of tensors to encodings: what changed, how the model uses it, which encoding pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..encodings import Dense, Encoding, Rows, Same, Sign
from ..errors import CalibrationError
from ..kernels import layout
from ..progress import Progress
from .changes import Change, check_finite, compare, row_blocks
from .fit import DeltaMatrix, Planes, ScaleFit
from .lowrank import LowRankFit
from .uses import Use, UseRecorder

Method = Literal["closed_form", "mean_abs"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to encode.

    Attributes:
        method: `closed_form` fits row scales to the inputs of each layer; `mean_abs` is one scale per matrix, mean
            |d|, from the weights.
        planes: sign planes per matrix, 1 to 4.
        rank: of the low-rank part of each matrix; 0 is none.
        columns: column scales for each plane (`closed_form` only).
        max_error: a matrix is stored dense if its planes leave more than this share of the tuned matrix's own norm.
        min_elements: smaller matrices are stored dense.
    """

    method: Method = "closed_form"
    planes: int = 1
    rank: int = 0
    columns: bool = True
    max_error: float = 0.25
    min_elements: int = 4096

    def __post_init__(self) -> None:
        if self.method not in ("closed_form", "mean_abs"):
            raise ValueError(f"method must be 'closed_form' or 'mean_abs', got {self.method!r}")
        if not isinstance(self.planes, int) or not 1 <= self.planes <= 4:
            raise ValueError(f"planes must be an integer, 1 to 4, got {self.planes!r}")
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"rank must be an integer, 0 or more, got {self.rank!r}")

    def sign_bytes(self, rows: int, features: int) -> int:
        """Bytes of the sign planes, scales and low-rank part of a matrix [rows, features]."""
        words = self.planes * (rows * (layout.words(features) + 1) + (features if self.scales_columns else 0))
        return 4 * words + 2 * min(self.rank, rows, features) * (rows + features)

    @property
    def scales_columns(self) -> bool:
        """Whether planes have column scales."""
        return self.columns and self.method != "mean_abs"


class _Collector:
    """Gathers, over one run of the model, how each candidate matrix is used, and fits its scales on the way."""

    def __init__(
        self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], candidates: set[str], settings: Settings
    ):
        self.base, self.tuned, self.settings = base, tuned, settings
        self.candidates = candidates
        self.transposed: dict[str, bool] = {}
        self.refused: dict[str, str] = {}
        self.fits: dict[str, ScaleFit] = {}

    def fit(self, name: str) -> ScaleFit:
        """The matrix's fit, made when first asked for."""
        if name not in self.fits:
            one_scale = self.settings.method == "mean_abs"
            matrix = DeltaMatrix(self.base[name], self.tuned[name], self.transposed.get(name, False))
            columns = self.settings.scales_columns
            self.fits[name] = ScaleFit(Planes(matrix, self.settings.planes, columns=columns, one_scale=one_scale))
        return self.fits[name]

    def __call__(self, use: Use) -> None:
        name = use.name
        if name not in self.candidates or name in self.refused:
            return
        if use.kind == "other":
            self._refuse(name, f"used by {use.op}")
        elif self.transposed.setdefault(name, use.transposed) != use.transposed:
            self._refuse(name, "multiplied both as stored and transposed")
        elif self.features(name) is None:
            self._refuse(name, f"shape {list(self.tuned[name].shape)} against the base's {list(self.base[name].shape)}")
        elif self.settings.method == "closed_form":
            if use.kind == "embedding":
                self.fit(name).update_embedding()
            elif use.operand is not None:
                self._update(name, use.operand)

    def features(self, name: str) -> int | None:
        """K, if both sides have the same."""
        side = 0 if self.transposed.get(name, False) else 1
        ours, theirs = self.base[name].shape[side], self.tuned[name].shape[side]
        return ours if ours == theirs else None

    def _update(self, name: str, x: Tensor) -> None:
        if x.is_meta:
            return
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f"{name}: the inputs it meets on the calibration data hold NaN or infinite values; "
                "run the tuned model in fp32 or bf16, or give other calibration data"
            )
        self.fit(name).update(x)

    def _refuse(self, name: str, why: str) -> None:
        self.refused[name] = why
        self.fits.pop(name, None)


def _pack(fit: ScaleFit, row_scale: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Sign, float]:
    """The planes packed block by block, and the norm of what they leave relative to the tuned matrix's."""
    planes, matrix = fit.planes, fit.matrix
    signs = torch.empty(planes.count, matrix.rows, layout.words(matrix.features), dtype=torch.int32)
    lost = 0.0
    for first, block in matrix.blocks():
        positives, left_over = planes.residual(block, first, row_scale)
        rows = slice(first, first + block.shape[0])
        for plane, positive in enumerate(positives):
            signs[plane, rows] = layout.pack(positive).cpu()
        if left is not None and right is not None:
            left_over -= (left[rows].float() @ right.float()).to(left_over.device)
        lost += float(left_over.square_().sum(dtype=torch.float64))
    tuned = matrix.tuned.detach()
    norm = sum(float(tuned[block].float().square().sum(dtype=torch.float64)) for block in row_blocks(tuned))
    col_scale = None if planes.col_scale is None else planes.col_scale.cpu()
    shape = tuple(matrix.base.shape)
    sign = Sign(shape, matrix.tuned.dtype, signs, row_scale.cpu(), col_scale, left, right, matrix.transposed)
    return sign, (lost / norm) ** 0.5 if norm > 0 else 0.0


def _fit_low_rank(
    collector: _Collector, forward: Callable[[], None] | None, handles: Mapping[str, Tensor], rank: int
) -> dict[str, LowRankFit]:
    """A second run: the low-rank part follows the final scales."""
    scales = {name: fit.solve() for name, fit in collector.fits.items()}
    low_rank = {name: LowRankFit(fit.planes, scales[name].row_scale, rank) for name, fit in collector.fits.items()}

    def on_use(use: Use) -> None:
        if use.kind == "linear" and use.name in low_rank and use.operand is not None and scales[use.name].input_weight:
            low_rank[use.name].update(use.operand, scales[use.name].input_weight)

    if forward is not None and any(found.input_weight for found in scales.values()):
        with UseRecorder(handles, on_use):
            forward()
    for name, found in scales.items():
        if found.row_weight:
            low_rank[name].update_weights(found.row_weight)
    return low_rank


def _keep(tensor: Tensor, copy: bool) -> Tensor:
    kept = tensor.detach().cpu()
    return kept.clone() if copy else kept


def _rows(tuned: Tensor, index: Tensor, over: Sign | None, transposed: bool) -> Rows:
    by_row = tuned.detach().T if transposed else tuned.detach()
    values = by_row[index.to(tuned.device)].cpu().contiguous()
    return Rows(tuple(tuned.shape), tuned.dtype, index, values, over, transposed)


def encode(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    forward: Callable[[], None] | None,
    settings: Settings,
    *,
    handles: Mapping[str, Tensor] | None = None,
    copy: bool = True,
    progress: Progress | None = None,
) -> tuple[dict[str, Encoding], dict[str, Any]]:
    """Encode every tuned tensor against its base.

    Semantics, first rule that holds:
        same   the base, in the tuned dtype, equals the tuned tensor
        dense  not a floating-point matrix, unknown to the base, of other features than the base's, or under
               `min_elements`
        rows   the rows that differ or are new, stored outright, take fewer bytes than sign planes
        dense  some use of it is not a plain product or lookup, or the planes are too far off (`max_error`) or not
               smaller
        sign   P planes; under `rows` with the new rows where the matrix grew

    Args:
        base, tuned: tensors by the tuned model's names; names that the base lacks are new.
        forward: runs the tuned model on calibration data (`closed_form`), or once on anything, meta tensors included,
            to show uses. It is called once, and once more when rank > 0. None: every matrix counts as an [N, K]
            linear weight, scales from the weights.
        settings: see `Settings`.
        handles: the tensors that `forward` uses, by the same names, where they are not `tuned` itself (a model on the
            meta device).
        copy: dense values are copied; False where `tuned` is mapped from a file that stays.
        progress: called with ("encode", done, total).

    Returns:
        Encodings by name, and the report: per sign-encoded matrix `error` (relative error of the delta's output on
        the calibration data, or of the delta itself where there was none) and `weight_error` (of the tuned matrix's
        norm), per dense matrix `why`.

    Raises:
        BitDeltaError: a parameter holds NaN or infinite values.  CalibrationError: a layer's inputs do.
    """
    handles = tuned if handles is None else handles
    changes: dict[str, Change] = {}
    for name, tensor in tuned.items():
        check_finite(name, tensor, "tuned")
        if name in base:
            check_finite(name, base[name], "base")
            changes[name] = compare(base[name], tensor)
    candidates = {
        name
        for name, change in changes.items()
        if not change.equal
        and tuned[name].is_floating_point()
        and tuned[name].dim() == base[name].dim() == 2
        and tuned[name].numel() >= settings.min_elements
        and base[name].numel() > 0
    }
    collector = _Collector(base, tuned, candidates, settings)
    if forward is not None and candidates:
        with torch.no_grad(), UseRecorder(handles, collector):
            forward()
    encodings: dict[str, Encoding] = {}
    report: dict[str, Any] = {}
    low_rank: dict[str, LowRankFit] = {}
    if settings.rank:
        for name in sorted(candidates - collector.refused.keys()):
            if collector.features(name) is not None:
                collector.fit(name)
        with torch.no_grad():
            low_rank = _fit_low_rank(collector, forward, handles, settings.rank)
    for done, (name, tensor) in enumerate(tuned.items()):
        if progress is not None:
            progress("encode", done, len(tuned))
        if name in changes and changes[name].equal:
            encodings[name] = Same(tuple(tensor.shape), tensor.dtype)
        elif name not in candidates:
            encodings[name] = Dense(tuple(tensor.shape), tensor.dtype, _keep(tensor, copy))
        else:
            with torch.no_grad():
                encodings[name], report[name] = _encode_matrix(name, collector, changes[name], low_rank.get(name), copy)
    if progress is not None:
        progress("encode", len(tuned), len(tuned))
    return encodings, report


def matrices_all_dense(encodings: Mapping[str, Encoding], settings: Settings) -> list[str]:
    """The matrices that are not tiny, if every one of them had to be stored outright; else none.

    All of them outright, where there are several, means that the model is no fine-tune of this base.
    """
    matrices = {
        name: encoding
        for name, encoding in encodings.items()
        if len(encoding.shape) == 2 and encoding.shape[0] * encoding.shape[1] >= settings.min_elements
    }
    return list(matrices) if all(encoding.kind == "dense" for encoding in matrices.values()) else []


def _encode_matrix(
    name: str, collector: _Collector, change: Change, low_rank: LowRankFit | None, copy: bool
) -> tuple[Encoding, dict[str, Any]]:
    """The encoding of a matrix that changed, by bytes and by measured error."""
    base, tuned, settings = collector.base[name], collector.tuned[name], collector.settings

    def dense(why: str) -> tuple[Encoding, dict[str, Any]]:
        return Dense(tuple(tuned.shape), tuned.dtype, _keep(tuned, copy)), {"why": why}

    if name in collector.refused:
        return dense(collector.refused[name])
    if collector.features(name) is None:
        return dense(f"the base has shape {list(base.shape)}")
    transposed = collector.transposed.get(name, False)
    ours, theirs = (t.shape[1 if transposed else 0] for t in (base, tuned))
    grown = torch.arange(ours, max(ours, theirs))
    listed = torch.cat([change.columns if transposed else change.rows, grown])
    features = tuned.shape[0 if transposed else 1]
    row_bytes = listed.element_size() + features * tuned.element_size()
    rows_bytes = listed.numel() * row_bytes
    planes_bytes = settings.sign_bytes(ours, features) + grown.numel() * row_bytes
    if rows_bytes < min(tuned.nbytes, planes_bytes):
        return _rows(tuned, listed, None, transposed), {"rows": listed.numel()}
    fit = collector.fit(name)
    scales = fit.solve()
    left = right = None
    if low_rank is not None:
        left, right, regained = low_rank.solve()
        scales.lost -= regained
    sign, weight_error = _pack(fit, scales.row_scale, left, right)
    error = (max(0.0, scales.lost) / scales.energy) ** 0.5 if scales.energy > 0 else 0.0
    collector.fits.pop(name)
    if weight_error > settings.max_error:
        return dense(f"planes leave {weight_error:.3g} of its norm, more than {settings.max_error:g}")
    if sign.nbytes + grown.numel() * row_bytes >= tuned.nbytes:
        return dense("planes take no fewer bytes")
    found = {"error": float(f"{error:.4g}"), "weight_error": float(f"{weight_error:.4g}")}
    return (sign if ours == theirs else _rows(tuned, grown, sign, transposed)), found
