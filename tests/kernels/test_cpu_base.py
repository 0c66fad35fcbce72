"""The base linear for few rows, compiled alone for each instruction set of this machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

WRAPPER = r"""
#include "cpu_base.h"
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  BFloat16(float value) { uint32_t word; std::memcpy(&word, &value, 4); bits = uint16_t(word >> 16); }
  operator float() const { const uint32_t word = uint32_t(bits) << 16; float f; std::memcpy(&f, &word, 4); return f; }
};
struct Sizes { int64_t M, N, K, step_n; };
#define EXPORT(NAME, D, T)                                                                                           \
  extern "C" void NAME(const T* x, const T* w, const Sizes* sizes, float* y) {                                       \
    const Sizes& s = *sizes;                                                                                         \
    const bitdelta::PackedRows<bitdelta::D<T>> rows(x, s.M, s.K);                                                    \
    for (int64_t n = 0; n < s.N; n += s.step_n)                                                                      \
      bitdelta::base_tile(rows, w, s.N, n, std::min(s.N, n + s.step_n), y + n, s.N);                                 \
  }
EXPORT(float32, Dot, float)
EXPORT(bfloat16, BFloat16Dot, BFloat16)
"""

Linear = Callable[[Tensor, Tensor, int], Tensor]


@pytest.fixture(scope="module")
def linear(build: Callable[[str], ctypes.CDLL]) -> Linear:
    """`linear(x, w, step_n)`: x @ w.T in tiles of that many outputs, fp32."""
    library = build(WRAPPER)

    def call(x: Tensor, w: Tensor, step_n: int) -> Tensor:
        y = torch.full((x.shape[0], w.shape[0]), torch.nan)
        sizes = (ctypes.c_int64 * 4)(*x.shape[:1], *w.shape, step_n)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, w)]
        getattr(library, str(x.dtype).removeprefix("torch."))(*pointers, sizes, ctypes.c_void_p(y.data_ptr()))
        return y

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 512), (2, 7, 31), (3, 13, 33), (7, 65, 100), (33, 130, 1100)])
def test_matches_the_dense_product(linear: Linear, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, outputs, features = shape
    x, w = torch.randn(rows, features).to(dtype), torch.randn(outputs, features).to(dtype)
    expected = x.double() @ w.double().T
    found = linear(x, w, outputs)
    assert float((found.double() - expected).norm()) <= 1e-6 * features**0.5 * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_depends_on_its_row_and_its_weights_only(linear: Linear, dtype: torch.dtype) -> None:
    x, w = torch.randn(11, 700).to(dtype), torch.randn(70, 700).to(dtype)
    together = linear(x, w, 70)
    assert torch.equal(linear(x, w, 33), together)
    for row in (0, 5, 10):
        assert torch.equal(linear(x[row : row + 1], w, 70)[0], together[row])
    x[3] = torch.nan
    others = [row for row in range(11) if row != 3]
    assert torch.equal(linear(x, w, 70)[others], together[others])
    assert linear(x, w, 70)[3].isnan().all()
