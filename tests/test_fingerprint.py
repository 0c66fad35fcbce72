"""Recognising a base in any dtype, and nothing else."""

import pytest
import torch

from bitdelta_compile.checkpoint import Checkpoint
from bitdelta_compile.errors import BaseMismatchError
from bitdelta_compile.fingerprint import Fingerprint, _positions


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(33, 17, generator=generator),
        "layer.bias": 1e-6 * torch.randn(5, generator=generator),
        "scale": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(4),
    }


def checkpoint(change=lambda name, tensor: tensor) -> Checkpoint:
    return Checkpoint("a copy", {name: change(name, tensor) for name, tensor in tensors().items()})


def cast(*dtypes: torch.dtype):
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for dtype in dtypes:
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensor

    return change


def test_covers_floating_point_tensors() -> None:
    fingerprint = Fingerprint.of(checkpoint())
    assert fingerprint.names == ("layer.weight", "layer.bias", "scale", "empty")
    assert fingerprint.shapes == ((33, 17), (5,), (), (0, 3))
    assert fingerprint.samples.shape == (4, 16)
    assert Fingerprint.of(checkpoint(), ["scale"]).names == ("scale",)


def test_positions_are_part_of_the_format() -> None:
    assert _positions(2**62)[:2] == [0x9E3779B97F4A7C15 >> 2, (2 * 0x9E3779B97F4A7C15 - 2**64) >> 2]
    values = torch.arange(10**6, dtype=torch.float64).reshape(1000, 1000)
    samples = Fingerprint.of(Checkpoint("x", {"x": values.T})).samples[0]
    first = torch.tensor([values.T.flatten()[position] for position in (618033, 236067, 854101, 472135)])
    assert torch.equal(samples[:4], first.to(torch.bfloat16))


@pytest.mark.parametrize("original", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_copies_in_other_dtypes_match(original, copy) -> None:
    fingerprint = Fingerprint.of(checkpoint(cast(original)))
    before, after = (checkpoint(change) for change in (cast(original), cast(original, copy)))
    exact = all(torch.equal(before.tensor(name).double(), after.tensor(name).double()) for name in before.names())
    assert fingerprint.check(checkpoint(cast(original, copy))) == ("exact" if exact else "up to bf16 rounding")
    fingerprint.check(checkpoint(cast(original, copy, torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_of_bf16_is_another_base(dtype) -> None:
    def step(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = cast(torch.bfloat16)(name, tensor)
        return (tensor.view(torch.int16) + 1).view(torch.bfloat16).to(dtype) if name == "layer.weight" else tensor

    with pytest.raises(
        BaseMismatchError, match=r"a copy is not the base .* layer\.weight holds .* \(1 of 4 parameters"
    ):
        Fingerprint.of(checkpoint(cast(dtype))).check(checkpoint(step))


def test_prefixes_and_ties_are_seen_through() -> None:
    fingerprint = Fingerprint.of(checkpoint())
    prefixed = Checkpoint("body", {"model." + name: tensor for name, tensor in tensors().items()})
    assert fingerprint.check(prefixed) == "exact"
    shared = tensors()
    tied = Checkpoint("tied", {"first": shared["layer.weight"], **shared})
    assert "layer.weight" in tied.tied
    assert fingerprint.check(tied) == "exact"


def test_missing_and_reshaped_parameters() -> None:
    fingerprint = Fingerprint.of(checkpoint())
    without = {name: tensor for name, tensor in tensors().items() if name != "scale"}
    with pytest.raises(BaseMismatchError, match=r"scale is missing \(1 of 4"):
        fingerprint.check(Checkpoint("x", without))
    with pytest.raises(BaseMismatchError, match=r"layer\.weight has shape \[17, 33\], not \[33, 17\]"):
        fingerprint.check(checkpoint(lambda name, t: t.reshape(17, 33) if name == "layer.weight" else t))
    with pytest.raises(BaseMismatchError, match="4 of 4 parameters differ"):
        fingerprint.check(Checkpoint("x", {"other": torch.ones(2)}))
