"""The canonical layout: bit order, round trips for any K, and what is refused."""

from __future__ import annotations

import pytest
import torch
from bitdelta_compile.kernels import layout
from hypothesis import given, settings
from hypothesis import strategies as st

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=2)
features = st.integers(0, 200)
seeds = st.integers(0, 2**31)


def random_bits(shape, count, seed):
    return torch.rand(*shape, count, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(shapes, features, seeds)
@settings(deadline=None)
def test_unpack_inverts_pack(shape, count, seed):
    positive = random_bits(shape, count, seed)
    signs = layout.pack(positive)
    assert signs.dtype == torch.int32
    assert signs.shape == (*shape, layout.words(count))
    assert torch.equal(layout.unpack(signs, count), positive)


@given(st.integers(1, 4), st.integers(1, 130), seeds)
@settings(deadline=None)
def test_bit_j_of_word_w_is_feature_32_w_plus_j(rows, count, seed):
    positive = random_bits((rows,), count, seed)
    signs = layout.pack(positive)
    for row in range(rows):
        for feature in range(count):
            word = int(signs[row, feature // 32]) & 0xFFFFFFFF
            assert bool(word >> (feature % 32) & 1) == bool(positive[row, feature])


@given(st.integers(1, 130), seeds)
@settings(deadline=None)
def test_bits_past_the_features_are_zero(count, seed):
    signs = layout.pack(torch.ones_like(random_bits((2,), count, seed)))
    layout.check_ragged_bits(signs, count)
    if count % 32:
        assert int(signs[0, -1]) == (1 << count % 32) - 1
        signs[0, -1] = -1
        with pytest.raises(ValueError, match="past feature"):
            layout.check_ragged_bits(signs, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_signs_are_plus_and_minus_one(dtype):
    positive = torch.tensor([[True, False, True]])
    assert torch.equal(layout.unpack_signs(layout.pack(positive), 3, dtype), torch.tensor([[1, -1, 1]], dtype=dtype))


def test_only_booleans_pack():
    with pytest.raises(TypeError, match="booleans"):
        layout.pack(torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signs": torch.zeros(2, 1, 5, 3, dtype=torch.int32)}, "cannot hold 40 features"),
        ({"signs": torch.zeros(2, 1, 5, 2)}, "must be int32"),
        ({"signs": torch.zeros(1, 5, 2, dtype=torch.int32)}, r"\[T, P, N, W\]"),
        ({"row_scale": torch.ones(2, 1, 4)}, "row_scale must be"),
        ({"col_scale": torch.ones(2, 1, 41)}, "col_scale must be"),
        ({"left": torch.ones(2, 5, 3)}, "both or neither"),
        ({"left": torch.ones(2, 4, 3), "right": torch.ones(2, 3, 40)}, "left must be"),
        ({"left": torch.ones(2, 5, 3), "right": torch.ones(2, 2, 40)}, "right must be"),
    ],
)
def test_banks_that_do_not_fit_are_refused_by_name(change, message):
    given_bank = {
        "signs": torch.zeros(2, 1, 5, 2, dtype=torch.int32),
        "row_scale": torch.ones(2, 1, 5),
        "col_scale": None,
        "left": None,
        "right": None,
    }
    layout.check_bank(**given_bank, features=40)
    with pytest.raises(ValueError, match=message):
        layout.check_bank(**(given_bank | change), features=40)
