"""What a delta remembers of its base: enough to recognise any faithful copy and to refuse everything else."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .checkpoint import Checkpoint, match_names
from .errors import BaseMismatchError
from .quantized import remedy

SAMPLES = 16
# 2**64 / golden ratio: its multiples modulo 2**64 spread evenly over any number of elements
_GOLDEN = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, eq=False)
class Fingerprint:
    """Shapes and sampled values of a base's floating-point parameters.

    Attributes:
        names: of the base's parameters.
        shapes: of each.
        samples: bf16 [len(names), 16], values at fixed pseudo-random positions of each (zeros where one is empty).
        digest: SHA-256 of the samples before rounding, as fp32: tells an exact copy from a rounded one.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    samples: Tensor
    digest: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> Fingerprint:
        """The fingerprint of `names` (default: all) of a checkpoint; only floating-point tensors count."""
        chosen = checkpoint.names() if names is None else names
        kept = tuple(name for name in chosen if checkpoint.dtype(name).is_floating_point)
        samples = _stack([_sample(checkpoint.tensor(name)) for name in kept])
        shapes = tuple(checkpoint.shape(name) for name in kept)
        return cls(kept, shapes, samples.to(torch.bfloat16), _digest(samples))

    def check(self, checkpoint: Checkpoint) -> str:
        """Recognise a copy of the base: of any dtype, sharded anyhow, with or without a prefix to its names.

        Returns:
            "exact", or "up to bf16 rounding" for a copy that has been through another dtype.

        Raises:
            BaseMismatchError: naming the first parameter that is missing or differs, and how many do.
        """
        pairs = match_names(self.names, [*checkpoint.names(), *checkpoint.tied])
        wrong: dict[str, str] = {}
        found: list[Tensor] = []
        for name in self.names:
            tensor = checkpoint.tensor(pairs[name]) if name in pairs else None
            difference = self.difference(name, tensor)
            if difference is not None:
                wrong[name] = difference
            elif tensor is not None:
                found.append(_sample(tensor))
        if wrong:
            first, difference = next(iter(wrong.items()))
            raise BaseMismatchError(
                f"{checkpoint.source} is not the base this delta was made for: {difference}"
                f" ({len(wrong)} of {len(self.names)} parameters differ); "
                f"{remedy(checkpoint.held(pairs[first]) if first in pairs else None)}"
            )
        return "exact" if _digest(_stack(found)) == self.digest else "up to bf16 rounding"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of the base's parameters."""
        return self.shapes[self.names.index(name)]

    def sample(self, name: str) -> Tensor:
        """bf16 [16], the sampled values of one of the base's parameters."""
        return self.samples[self.names.index(name)]

    def difference(self, name: str, tensor: Tensor | None, sample: Tensor | None = None) -> str | None:
        """In what way `tensor` cannot be a copy of the base's parameter `name`; None when it can.

        Args:
            sample: its sampled values, where they are known and it has none to read.
        """
        row = self.names.index(name)
        if tensor is None:
            return f"{name} is missing"
        if tuple(tensor.shape) != self.shapes[row]:
            return f"{name} has shape {list(tensor.shape)}, not {list(self.shapes[row])}"
        sample, kept = _sample(tensor) if sample is None else sample.float(), self.samples[row].float()
        off = ~_same_value(sample, kept)
        if not bool(off.any()):
            return None
        return f"{name} holds {sample[off][0]:.6g} where the base has {kept[off][0]:.6g}"


def _positions(count: int) -> list[int]:
    """16 positions in a tensor of `count` elements: the same for every layout, dtype and version of torch."""
    return [((index + 1) * _GOLDEN % 2**64) * count >> 64 for index in range(SAMPLES)]


def _sample(tensor: Tensor) -> Tensor:
    """fp32 [16]: values at `_positions` in row-major order, read without copying the tensor."""
    count = math.prod(tensor.shape)
    if count == 0:
        return torch.zeros(SAMPLES)
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    positions = torch.tensor(_positions(count), device=tensor.device)
    return tensor.detach()[torch.unravel_index(positions, tensor.shape)].float().cpu()


def _same_value(sample: Tensor, kept: Tensor) -> Tensor:
    """Whether fp32 samples can be copies of the values that were rounded to bf16 in `kept`.

    A copy through fp32 or bf16 rounds to `kept` itself. One through fp16 was rounded twice: it may lie half a step of
    bf16 plus half a step of fp16 away, still less than the one step of bf16 by which a neighbouring value differs.
    """
    rounded = sample.to(torch.bfloat16).float() == kept
    exponent = torch.frexp(kept).exponent.float()
    reach = torch.exp2(exponent - 9) + torch.exp2(exponent - 12).clamp(min=2.0**-25)
    return rounded | ((sample.half().float() == sample) & ((sample - kept).abs() <= reach))


def _stack(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples) if samples else torch.zeros(0, SAMPLES)


def _digest(samples: Tensor) -> str:
    return hashlib.sha256(samples.numpy().astype("<f4").tobytes()).hexdigest()
