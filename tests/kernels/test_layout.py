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


@given(shapes, st.integers(1, 40), st.integers(1, 600), seeds)
@settings(deadline=None, max_examples=60)
def test_the_device_layout_round_trips(shape, rows, count, seed):
    signs = layout.pack(random_bits((*shape, rows), count, seed))
    made = layout.to_layout(signs, count, layout.FRAGMENTS)
    assert made.shape == (*shape, *layout.packed_shape(rows, count, layout.FRAGMENTS))
    assert torch.equal(layout.from_layout(made, rows, count, layout.FRAGMENTS), signs)
    if not shape:
        assert made.nbytes - signs.nbytes == layout.padding_bytes(rows, count, layout.FRAGMENTS)


@pytest.mark.parametrize("count", [31, 128, 130, 384, 520])
def test_a_word_of_the_device_layout_is_where_its_definition_says(count):
    signs = layout.pack(random_bits((40,), count, 0))
    made = layout.to_layout(signs, count, layout.FRAGMENTS)
    for n in range(40):
        for w in range(layout.words(count)):
            tile, h, g = n // 16, n // 8 % 2, n % 8
            block, s, q = w // 8, w // 4 % 2, w % 4
            is_half = -(-count // 128) % 2 == 1 and block == count // 256
            place = 128 * block + (2 * (4 * g + q) + h if is_half else 4 * (4 * g + q) + 2 * s + h)
            assert made[tile, place] == signs[n, w]


def test_the_device_layout_pads_little():
    assert layout.padding_bytes(384, 384, layout.FRAGMENTS) == 0
    assert layout.padding_bytes(4096, 14336, layout.FRAGMENTS) == 0
    assert layout.padding_bytes(17, 129, layout.FRAGMENTS) == 4 * (32 * 8 - 17 * 5)
    with pytest.raises(ValueError, match="unknown sign layout 'swizzled'"):
        layout.packed_shape(16, 16, "swizzled")


@pytest.mark.parametrize("shape", [(2, 1, 5, 2), (2, 1, 1, 65), (1, 64)])
def test_signs_of_another_layout_are_refused(shape):
    with pytest.raises(ValueError, match=r"fragments_16x256|\[T, P, N, W\]"):
        layout.check_bank(
            torch.zeros(shape, dtype=torch.int32), torch.ones(2, 1, 5), None, None, None, 40, layout.FRAGMENTS
        )
