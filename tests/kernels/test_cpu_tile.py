"""The CPU op's device functions, compiled alone for each instruction set of this machine, against the reference."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import pytest
import torch
from bitdelta_compile.kernels import layout, reference
from torch import Tensor

WRAPPER = r"""
#include "cpu_tile.h"
struct BFloat16 {
  uint16_t bits;
  operator float() const { const uint32_t word = uint32_t(bits) << 16; float f; std::memcpy(&f, &word, 4); return f; }
};
struct Sizes { int64_t M, P, N, K, step_m, step_n; };
#define EXPORT(NAME, SUMS, T)                                                                                        \
  extern "C" void NAME(const T* x, const int32_t* signs, const float* row_scale, const float* col_scale,             \
                       const int64_t* index, const Sizes* sizes, float* y) {                                         \
    const Sizes& s = *sizes;                                                                                         \
    const bitdelta::Delta delta{signs, row_scale, s.P, s.N, s.K};                                                    \
    for (int64_t m = 0; m < s.M; m += s.step_m)                                                                      \
      for (int64_t n = 0; n < s.N; n += s.step_n)                                                                    \
        bitdelta::delta_tile<bitdelta::SUMS>(delta, col_scale, x, s.K, 1, index + m, std::min(s.step_m, s.M - m), n, \
                                             std::min(s.N, n + s.step_n), y + m * s.N + n, s.N);                     \
  }
EXPORT(exact_float32, ExactSums, float)
EXPORT(exact_bfloat16, ExactSums, BFloat16)
EXPORT(rounded_float32, RoundedSums, float)
EXPORT(rounded_bfloat16, RoundedSums, BFloat16)
"""

Tiles = Callable[..., Tensor]


def tiles_of(library: ctypes.CDLL) -> Tiles:
    """`tiles(sums, x, signs, row_scale, col_scale, index, step_m, step_n)`: x[index], fp32, tile by tile."""

    def call(
        sums: str,
        x: Tensor,
        signs: Tensor,
        row_scale: Tensor,
        col_scale: Tensor | None,
        index: Tensor,
        step_m: int,
        step_n: int,
    ) -> Tensor:
        planes, outputs, _ = signs.shape
        y = torch.full((index.numel(), outputs), torch.nan)
        pointers = [t if t is None else ctypes.c_void_p(t.data_ptr()) for t in (x, signs, row_scale, col_scale, index)]
        sizes = (ctypes.c_int64 * 6)(index.numel(), planes, outputs, x.shape[1], step_m, step_n)
        function = getattr(library, f"{sums}_{str(x.dtype).removeprefix('torch.')}")
        function(*pointers, sizes, ctypes.c_void_p(y.data_ptr()))
        return y

    return call


@pytest.fixture(scope="module")
def all_tiles(build: Callable[[str], ctypes.CDLL]) -> Tiles:
    """`tiles_of` each instruction set."""
    return tiles_of(build(WRAPPER))


@pytest.fixture(params=["exact", "rounded"])
def sums(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiles(all_tiles: Tiles, sums: str) -> Tiles:
    """`all_tiles` with exact and with rounded sums."""
    return functools.partial(all_tiles, sums)


def _case(
    rows: int, planes: int, outputs: int, features: int, dtype: torch.dtype, scaled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x [M, K], signs [P, N, W], row_scale [P, N] and col_scale [P, K] or None."""
    generator = torch.Generator().manual_seed(rows * 7 + planes * 5 + outputs * 3 + features)
    positive = torch.randint(2, (planes, outputs, features), generator=generator).bool()
    x = torch.randn(rows, features, generator=generator).to(dtype)
    row_scale = torch.randn(planes, outputs, generator=generator)
    col_scale = torch.rand(planes, features, generator=generator) + 0.5 if scaled else None
    return x, layout.pack(positive), row_scale, col_scale


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "step_m", "step_n"),
    [
        ((1, 1, 1, 1), 1, 1),
        ((1, 1, 64, 512), 1, 64),
        ((2, 2, 7, 31), 2, 5),
        ((3, 3, 17, 33), 2, 17),
        ((5, 1, 65, 100), 3, 64),
        ((17, 2, 130, 513), 17, 100),
        ((33, 1, 384, 1100), 20, 256),
        ((3, 18, 70, 600), 3, 64),
        ((1, 1, 130, 9000), 1, 130),
    ],
)
def test_matches_the_reference(
    tiles: Tiles,
    sums: str,
    shape: tuple[int, int, int, int],
    step_m: int,
    step_n: int,
    dtype: torch.dtype,
    scaled: bool,
) -> None:
    rows, planes, _, features = shape
    x, signs, row_scale, col_scale = _case(*shape, dtype, scaled)
    index = torch.arange(rows).flip(0)
    slot_col_scale = None if col_scale is None else col_scale.unsqueeze(0)
    expected = reference.delta_linear(x[index], signs.unsqueeze(0), row_scale.unsqueeze(0), slot_col_scale)
    found = tiles(x, signs, row_scale, col_scale, index, step_m, step_n)
    largest = float(row_scale.abs().max()) * float(x.abs().max()) * (1.5 if scaled else 1.0)
    bound = {"exact": 4e-6, "rounded": 8e-3}[sums] * (planes * features) ** 0.5 * largest
    assert float((found.double() - expected).abs().max()) <= bound


def test_rounding_is_that_of_bf16(all_tiles: Tiles) -> None:
    x, signs, row_scale, _ = _case(8, 1, 256, 4096, torch.bfloat16, False)
    x[:, 7] = 40  # alone in its block: others keep their precision
    expected = reference.delta_linear(x, signs.unsqueeze(0), row_scale.unsqueeze(0)).double()
    found = all_tiles("rounded", x, signs, row_scale, None, torch.arange(8), 8, 256).double()
    rounded = expected.bfloat16().double()
    assert (found - expected).norm() <= 1.5 * (rounded - expected).norm()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 3, 17, 33), (5, 2, 130, 513), (3, 18, 70, 600)])
def test_rounded_sums_do_not_depend_on_the_instruction_set(
    build_for: Callable[[str, str], ctypes.CDLL], shape: tuple[int, int, int, int], dtype: torch.dtype, scaled: bool
) -> None:
    x, signs, row_scale, col_scale = _case(*shape, dtype, scaled)
    x[0, 0] = torch.inf
    x[-1, -1] = torch.nan
    found = [
        tiles_of(build_for(isa, WRAPPER))("rounded", x, signs, row_scale, col_scale, torch.arange(shape[0]), 3, 64)
        for isa in ("AVX2", "AVX512")
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e35])
def test_any_size_of_x(tiles: Tiles, size: float) -> None:
    x, signs, row_scale, _ = _case(2, 1, 70, 300, torch.float32, False)
    expected = reference.delta_linear(x, signs.unsqueeze(0), row_scale.unsqueeze(0)).double() * size
    found = tiles(x * size, signs, row_scale, None, torch.arange(2), 2, 70).double()
    assert (found - expected).norm() <= max(3e-3 * float(expected.norm()), 1e-35)


def test_a_row_does_not_depend_on_its_company(tiles: Tiles) -> None:
    x, signs, row_scale, col_scale = _case(21, 2, 70, 700, torch.float32, True)
    index = torch.arange(21)
    together = tiles(x, signs, row_scale, col_scale, index, 21, 70)
    for row in (0, 3, 15, 20):
        alone = tiles(x, signs, row_scale, col_scale, index[row : row + 1], 1, 33)
        assert torch.equal(alone[0], together[row])


def test_features_past_the_end_are_not_read(tiles: Tiles) -> None:
    x, signs, row_scale, _ = _case(2, 1, 20, 40, torch.float32, False)
    x[1] = torch.nan
    assert bool(tiles(x, signs, row_scale, None, torch.tensor([0]), 1, 20).isfinite().all())


def test_infinite_features_stay_infinite(tiles: Tiles) -> None:
    x, signs, row_scale, _ = _case(1, 1, 20, 40, torch.float32, False)
    x[0, 5] = torch.inf
    signed = layout.unpack_signs(signs, 40)[0, :, 5] * row_scale[0]
    found = tiles(x, signs, row_scale, None, torch.tensor([0]), 1, 20)
    assert torch.equal(found[0], signed * torch.inf)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_plane_without_scales_is_not_read(tiles: Tiles, scaled: bool) -> None:
    x, signs, row_scale, col_scale = _case(3, 3, 300, 700, torch.float32, scaled)
    row_scale[1] = 0
    row_scale[2, 64:192] = 0
    some = [0, 2]
    index = torch.arange(3)
    found = tiles(x, signs, row_scale, col_scale, index, 3, 128)
    present = None if col_scale is None else col_scale[some].contiguous()
    without = tiles(x, signs[some].contiguous(), row_scale[some].contiguous(), present, index, 3, 128)
    assert torch.equal(found, without)
    assert not found[:, 64:192].eq(0).any()  # the first plane is still there
    row_scale[0, 64:192] = 0
    x[1, 5] = torch.inf
    absent = tiles(x, signs, row_scale, col_scale, index, 3, 128)[:, 64:192]
    assert absent.eq(0).all()  # nothing of the signs was used: a sum over them would give inf * 0
