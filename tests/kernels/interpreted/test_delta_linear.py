"""delta_linear's kernels against the reference: odd shapes, all dtypes, all popularities, the numerics promised."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from bitdelta_compile.kernels import configs, delta_linear, fused, reference
from torch import Tensor

# the interpreter's own, with loop bounds known at run time
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

FORM = "asm" if "RUN_PTX" in os.environ else "interpreted"
PREFILL = configs.prefill(int(os.environ.get("RUN_PTX", "90")))[0]
SMALL = configs.Exact(1, 2, 2, 8, 1, 1)
EXACT = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def binary(config: configs.Binary, wide: bool = False) -> configs.Plan:
    return configs.Plan(config, wide=wide)


def exact(config: configs.Exact, splits: int, *, is_sorted: bool = False) -> configs.Plan:
    return configs.Plan(config, splits=splits, sorted=is_sorted, form=FORM)


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest error of a row over the root mean square of its results; rows that are 0 must be 0."""
    scale = expected.pow(2).mean(-1).sqrt()
    error = (found.double() - expected).abs().amax(-1)
    assert not error[scale == 0].any()
    return float((error / scale.clamp_min(1e-30))[scale > 0].max())


PLANS = {
    "binary 16": (binary(configs.BINARY_DECODE[0]), 4e-4),
    "binary 24": (binary(configs.BINARY_DECODE[0], True), 2e-6),
    "binary narrow": (binary(configs.BINARY_DECODE[1], True), 2e-6),
    "binary groups": (binary(configs.BINARY_DECODE[2], True), 2e-6),
    "binary along N": (binary(configs.Binary(1, 2, 2, 2, 2), True), 2e-6),
    "exact": (exact(SMALL, 3), 2e-6),
    "prefill": (exact(PREFILL.of_parts(3), 3, is_sorted=True), 2e-6),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize(
    ("rows", "slots", "planes", "outputs", "features", "column", "rank"),
    [
        (1, 1, 1, 1, 31, False, 0),
        (5, 3, 2, 33, 300, True, 3),
        (3, 2, 1, 17, 1030, False, 0),
        (4, 4, 1, 16, 384, True, 0),
        (6, 1, 1, 16, 140, False, 0),
    ],
)
def test_odd_shapes(bank, packed, kind, rows, slots, planes, outputs, features, column, rank):
    plan, tolerance = PLANS[kind]
    tensors = bank(slots, planes, outputs, features, column=column, rank=rank)
    tenant = None if slots == 1 else torch.tensor([1, -1, 0, 2**30, 1, -7], dtype=torch.int32)[:rows]
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    found = delta_linear.delta_linear(x, *packed(tensors, features), tenant, plan)
    assert worst(found, reference.delta_linear(x, *tensors, tenant)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["binary", "exact"])
def test_dtypes_and_strides(bank, packed, dtype, path):
    tensors = bank(2, 1, 20, 520)
    tenant = torch.tensor([1, 0], dtype=torch.int32)
    x = torch.randn(520, 2, 2, generator=torch.Generator().manual_seed(2)).to(dtype).permute(1, 2, 0)  # [2, 2, 520]
    wide = dtype == torch.float32
    plan = exact(SMALL, EXACT[dtype]) if path == "exact" else binary(configs.BINARY_DECODE[2], wide)
    found = delta_linear.delta_linear(x, *packed(tensors, 520), tenant, plan)
    assert found.dtype == dtype
    assert found.shape == (2, 2, 20)
    expected = reference.delta_linear(x, *tensors, tenant)
    assert worst(found, expected) < (1e-5 if wide else 2e-2)
    precise = delta_linear.delta_linear(x, *packed(tensors, 520), tenant, plan, dtype=torch.float32)
    assert worst(precise, expected) < (1e-4 if path == "binary" else 2e-6)


POPULARITY = {
    "distinct": [*range(6)],
    "zipf": [0, 4, 0, 1, 0, 1],
    "identical": [6] * 6,
    "skewed, with the base": [2, -1, 2, 2, -1, 5],
}


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("kind", ["binary 16", "binary groups", "exact", "prefill"])
def test_a_row_does_not_depend_on_its_neighbours(bank, packed, popularity, kind):
    plan, tolerance = PLANS[kind]
    index = POPULARITY[popularity]
    unused = sorted(set(range(9)) - set(index))
    tensors = bank(9, 1, 20, 140, poisoned=unused)
    x = torch.randn(6, 140, generator=torch.Generator().manual_seed(3))
    tenant = torch.tensor(index, dtype=torch.int32)
    found = delta_linear.delta_linear(x, *packed(tensors, 140), tenant, plan)
    clean = bank(9, 1, 20, 140)
    assert worst(found, reference.delta_linear(x, *clean, tenant)) < tolerance
    alone = torch.full((6,), -1, dtype=torch.int32)
    alone[3] = index[3]
    noise = torch.randn(6, 140)
    noise[3] = x[3]
    again = delta_linear.delta_linear(noise, *packed(clean, 140), alone, plan)
    assert torch.equal(again[3], found[3])
    assert not again[alone < 0].any()


@pytest.mark.parametrize("kind", ["binary 24", "exact"])
def test_a_plane_that_a_tenant_lacks_adds_nothing(bank, packed, kind):
    tensors = bank(2, 2, 20, 300, column=True)
    tensors[1][1, 1] = 0
    tenant = torch.tensor([1, 0, 1], dtype=torch.int32)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(4))
    expected = reference.delta_linear(x, *tensors, tenant)
    tensors[2][1, 1] = float("nan")
    found = delta_linear.delta_linear(x, *packed(tensors, 300), tenant, PLANS[kind][0])
    assert worst(found, expected) < 2e-6


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy, for inf - inf
def test_rows_that_are_not_finite_keep_it_to_themselves(bank, packed):
    tensors = bank(1, 1, 20, 140)
    x = torch.randn(3, 140)
    x[1, 7] = float("inf")
    for kind in ("binary 24", "exact"):
        found = delta_linear.delta_linear(x, *packed(tensors, 140), None, PLANS[kind][0])
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()


def test_rows_of_no_size_are_zero(bank, packed):
    tensors = bank(1, 1, 20, 140)
    x = torch.zeros(2, 140)
    x[1] = 1e-36
    for kind in ("binary 16", "exact"):
        assert delta_linear.delta_linear(x, *packed(tensors, 140), None, PLANS[kind][0]).abs().max() < 1e-30


@pytest.mark.parametrize(
    ("plan", "dtype", "outlier", "limit"),
    [
        (binary(configs.BINARY_DECODE[0]), torch.bfloat16, None, 1e-4),
        (binary(configs.BINARY_DECODE[0]), torch.float16, None, 1e-4),
        (binary(configs.BINARY_DECODE[0]), torch.bfloat16, 300.0, 5e-3),
        (binary(configs.BINARY_DECODE[0], True), torch.float32, None, 5e-6),
        (exact(SMALL, 1), torch.bfloat16, None, 1e-6),
        (exact(SMALL, 2), torch.float16, None, 1e-6),
        (exact(SMALL, 3), torch.float32, None, 1e-5),
        (exact(SMALL, 1), torch.bfloat16, 300.0, 1e-6),
        (exact(PREFILL, 1, is_sorted=True), torch.bfloat16, None, 1e-6),
    ],
    ids=str,
)
def test_promised_numerics(bank, packed, plan, dtype, outlier, limit):
    tensors = bank(1, 1, 96, 4096)
    x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(5)).to(dtype)
    if outlier is not None:
        x[:, 1234] = outlier
    found = delta_linear.delta_linear(x, *packed(tensors, 4096), None, plan, dtype=torch.float32)
    assert worst(found, reference.delta_linear(x, *tensors)) < limit


def test_the_mean_of_x_adds_no_error(bank, packed):
    """What products of bits that are 0 or 1 have too much would be large: the sum of x."""
    tensors = bank(1, 1, 32, 4096)
    x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(5))
    x[0] += 3.0
    x[1] += 3.0 - 6.0 * (torch.arange(4096) % 2)
    x = x.bfloat16()
    found = delta_linear.delta_linear(x, *packed(tensors, 4096), None, exact(SMALL, 1), dtype=torch.float32)
    assert worst(found, reference.delta_linear(x, *tensors)) < 1e-6


@pytest.mark.parametrize("plan", [binary(configs.BINARY_DECODE[1]), exact(SMALL, 1)], ids=str)
def test_the_widest_rows(bank, packed, plan):
    tensors = bank(1, 1, 16, 32768)
    x = torch.full((1, 32768), 255.0).bfloat16()  # the integers' sums reach the edge of int32
    x[0, ::3] = -3.5
    found = delta_linear.delta_linear(x, *packed(tensors, 32768), None, plan, dtype=torch.float32)
    assert worst(found, reference.delta_linear(x, *tensors)) < 2e-5


def test_many_rows_and_slots(bank, packed):
    tensors = bank(64, 1, 16, 40)
    used = torch.tensor([63, -1, 0, 17, 64, 18, -1], dtype=torch.int32)
    tenant = used[torch.randint(7, (257,), generator=torch.Generator().manual_seed(6))]
    x = torch.randn(257, 40, generator=torch.Generator().manual_seed(7))
    plan = exact(dataclasses.replace(SMALL, BM=32), 3, is_sorted=True)
    found = delta_linear.delta_linear(x, *packed(tensors, 40), tenant, plan)
    assert worst(found, reference.delta_linear(x, *tensors, tenant)) < 2e-6


def test_several_rows_per_entry(bank, packed):
    tensors = bank(3, 1, 17, 40)
    tenant = torch.tensor([2, -1, 0, 2], dtype=torch.int32)
    x = torch.randn(4, 10, 40, generator=torch.Generator().manual_seed(8))
    for kind in ("binary groups", "prefill"):
        plan, tolerance = PLANS[kind]
        found = delta_linear.delta_linear(x, *packed(tensors, 40), tenant, plan)
        assert worst(found, reference.delta_linear(x, *tensors, tenant)) < tolerance


@pytest.mark.parametrize("kind", ["fused", "fused groups", "exact", "prefill"])
def test_base_in_the_same_launch(bank, packed, kind, monkeypatch):
    made, zeros = [], torch.zeros

    def kept(*size, **kwargs):
        made.append(zeros(*size, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", kept)
    tensors = bank(3, 1, 70, 300, rank=2)
    tenant = torch.tensor([2, -1, 0, 2, 2], dtype=torch.int32)
    generator = torch.Generator().manual_seed(9)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((5, 300), (70, 300), (70,)))

    def run(rows: Tensor, index: Tensor, signs: tuple[Tensor, ...]) -> Tensor:
        if kind in PLANS:
            plan = PLANS[kind][0]
            return delta_linear.delta_linear(rows, *packed(signs, 300), index, plan, weight=weight) + bias
        config = configs.FUSED_DECODE[int(kind == "fused groups")]
        plan = configs.Plan(config, wide=True, form=FORM)
        return fused.base_delta_linear(rows, weight, bias, *packed(signs, 300), index, plan)

    found = run(x, tenant, tensors)
    base = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert worst(found, base + reference.delta_linear(x, *tensors, tenant)) < 2e-6
    none = run(x, torch.full((5,), -1, dtype=torch.int32), bank(3, 1, 70, 300, rank=2, poisoned=[0, 1, 2]))
    assert torch.equal(none[1], found[1])
    counters = [tensor for tensor in made if tensor.dim() == 1 and tensor.dtype == torch.int32]
    assert len(counters) == (2 if kind.startswith("fused") else 0)
    assert not any(tensor.any() for tensor in counters), "the next launch of a graph counts from there"


@pytest.mark.parametrize("kind", ["fused", "fused groups", "exact", "prefill"])
def test_a_base_of_two_bytes_and_many_steps(bank, packed, kind):
    """More steps than loads are under way at a time, in every part of K."""
    tensors = bank(3, 1, 70, 1400)
    tenant = torch.tensor([2, -1, 0, 2, 2], dtype=torch.int32)
    generator = torch.Generator().manual_seed(10)
    x, weight = (torch.randn(size, generator=generator).bfloat16() for size in ((5, 1400), (70, 1400)))
    arguments = (*packed(tensors, 1400), tenant)
    if kind.startswith("fused"):
        config = configs.FUSED_DECODE[int(kind == "fused groups")]
        assert config.part(1400) > config.STAGES * config.BK
        found = fused.base_delta_linear(x, weight, None, *arguments, configs.Plan(config, form=FORM))
    else:
        plan = exact(*((SMALL, 1) if kind == "exact" else (PREFILL, 1)), is_sorted=kind == "prefill")
        found = delta_linear.delta_linear(x, *arguments, plan, weight=weight)
    base = torch.nn.functional.linear(x.double(), weight.double())
    assert worst(found, base + reference.delta_linear(x, *tensors, tenant)) < 2e-2
