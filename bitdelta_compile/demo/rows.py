"""The rows of the demo's batch: what they should be, how far off they are, and the checks of that.

Distances are Frobenius norms of differences of last hidden states over a row's tokens, as shares of the row's gap: the
distance between the base and the row's fine-tune as it was published; for the base's own rows, between the base and the
nearest of the fine-tunes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import fidelity
from ..errors import BitDeltaError
from ..fidelity import Batch

if TYPE_CHECKING:
    from ..delta import Delta

BASE_NAME = "base"
EXACT = 1e-3  # most that a row may be off what its dense model gives
APART = 0.1  # least that it must be off what any other gives


class DemoFailedError(BitDeltaError):
    """What the demo was about to show is not so."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the batch, and how far what the attached model gives for it is from what other models give.

    Attributes:
        tenant: its name, "base" for the base.
        text: its text.
        own: from its own dense model: the delta's fp32 materialization, or the base.
        published: from the fine-tune as it was published: what the compression has lost; None for the base.
        others: from the dense models of the base and the other tenants, by name.
    """

    tenant: str
    text: str
    own: float
    published: float | None
    others: dict[str, float]

    def check(self) -> None:
        """DemoFailedError unless it is its own dense model's, nobody else's, and nearest to its own fine-tune."""
        if not self.own <= EXACT:
            raise DemoFailedError(
                f"a row of {self.tenant} is {self.own:.1e} of its gap off its dense model, more than {EXACT}: the "
                "compiled graph is wrong on this machine; `bitdelta doctor` says what it runs on"
            )
        for name, distance in self.others.items():
            if not distance >= APART:
                raise DemoFailedError(
                    f"a row of {self.tenant} is only {distance:.1e} of its gap off what {name} gives, less than "
                    f"{APART}: it does not have a delta of its own"
                )
            if self.published is not None and not self.published < distance:
                raise DemoFailedError(
                    f"a row of {self.tenant} is nearer to what {name} gives ({distance:.2f} of its gap) than to its "
                    f"own fine-tune ({self.published:.2f})"
                )


class Scale:
    """What dense models give for the batch, and distances by that scale.

    Attributes:
        batch: forward's arguments, [B, S] each.
        dense: by tenant and None for the base, what the base and the deltas' fp32 materializations give: [B, S, H].
        published: what the fine-tunes themselves give.
    """

    def __init__(self, base_folder: Path, tuned: Mapping[str, Path], deltas: Mapping[str, Delta], batch: Batch) -> None:
        self.batch = batch
        self.dense: dict[str | None, Tensor] = {None: hidden(fidelity.load_model(base_folder)[0], batch)}
        self.published: dict[str, Tensor] = {}
        for name, delta in deltas.items():
            self.published[name] = hidden(fidelity.load_model(tuned[name])[0], batch)
            self.dense[name] = hidden(materialized(delta, base_folder), batch)

    def distance(self, one: Tensor, other: Tensor, at: int, tenant: str | None) -> float:
        """Between two results for row `at` of the batch, [S, H] each."""
        mask = self.batch["attention_mask"][at].bool()
        ends = self.published.values() if tenant is None else [self.published[tenant]]
        gap = min(float((end[at] - self.dense[None][at])[mask].norm()) for end in ends)
        return float((one - other)[mask].norm()) / gap

    def worst(self, found: Tensor, expected: Tensor, tenants: Sequence[str | None]) -> float:
        """The largest distance of a row of `found`, [B, S, H], from that of `expected`; tenants: one per row."""
        if len(found) != len(tenants):
            return float("inf")
        return max(self.distance(found[at], expected[at], at, tenant) for at, tenant in enumerate(tenants))

    def row(self, found: Tensor, at: int, tenant: str | None, text: str) -> Row:
        """Row `at` of what the attached model gave, [B, S, H]."""

        def to(other: Tensor) -> float:
            return self.distance(found[at], other[at], at, tenant)

        return Row(
            tenant=tenant or BASE_NAME,
            text=text,
            own=to(self.dense[tenant]),
            published=None if tenant is None else to(self.published[tenant]),
            others={name or BASE_NAME: to(value) for name, value in self.dense.items() if name != tenant},
        )


def check_alone(
    found: Tensor,
    tenants: Sequence[str | None],
    alone: Mapping[str | None, Tensor],
    either: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Check that every row is, bit for bit, what it is when all rows of the batch are of its tenant.

    Args:
        found: [B, S, H].
        tenants: one per row.
        alone: by tenant, the result when all rows are its own, [B, S, H].
        either: tenants that changed meanwhile: a row of theirs must be one of these tenants'.

    Raises:
        DemoFailedError: a row is not.
    """
    for at, tenant in enumerate(tenants):
        allowed: Sequence[str | None] = (either or {}).get(tenant or BASE_NAME, [tenant])
        if not any(torch.equal(found[at], alone[name][at]) for name in allowed):
            raise DemoFailedError(
                f"row {at}, of {tenant or BASE_NAME}, is not bit for bit what it is when all rows are of its tenant"
            )


def materialized(delta: Delta, base_folder: Path) -> nn.Module:
    """The dense model that a delta stands for, in fp32."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "materialized"
        delta.save_pretrained(base_folder, folder, dtype=torch.float32)
        model, _ = fidelity.load_model(folder)
    return model


@torch.no_grad()
def hidden(model: Any, batch: Batch, **kwargs: Any) -> Tensor:
    """Last hidden states: [B, S, H]."""
    found: Tensor = model(**batch, **kwargs)[0]
    return found
