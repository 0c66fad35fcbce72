"""The parts of the GPU kernels: bits as numbers, operands made of x, segments, lookups."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from bitdelta_compile.kernels import configs, delta_embedding, layout, operands, reference, segments, tile, tile_linear

# the interpreter's own, with loop bounds known at run time
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@triton.jit
def numbers(words_ptr, out_ptr, FORM: tl.constexpr):
    at = tl.arange(0, 256)
    words = tl.load(words_ptr + at)
    for bit in tl.static_range(16):
        number = tile.bit_operand(words, bit, FORM)
        tl.store(out_ptr + bit * 256 + at, number.to(tl.int16, bitcast=True))


def test_bits_are_the_same_numbers_in_every_form():
    words = torch.randint(-(2**15), 2**15, (256,), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    found = {}
    for form in ("asm", "plain"):
        out = torch.empty(16, 256, dtype=torch.int16)
        numbers[1,](words, out, FORM=form)
        found[form] = out.view(torch.bfloat16).double()
    assert torch.equal(found["asm"], found["plain"])
    for bit in range(16):
        is_set = ((words.int() >> bit & 1) ^ (tile.COMPLEMENTED.value >> bit & 1)).double()
        exponent = (1 << (bit - 7 if bit >= 7 else bit + 1)) - 127
        expected = 2 * is_set - 1 if bit == 15 else is_set * 2.0**exponent
        assert torch.equal(found["plain"][bit], expected)


@triton.jit
def planes_alive(scale_ptr, out_ptr):
    plane = tl.program_id(0)
    scale = tl.load(scale_ptr + plane * 16 + tl.arange(0, 16))
    tl.store(out_ptr + plane, tile_linear.is_live(scale, True))


def test_a_plane_without_scales_is_skipped():
    scale = torch.zeros(3, 16)
    scale[1, 5] = -1e-6
    out = torch.empty(3, dtype=torch.int32)
    planes_alive[3,](scale, out)
    assert out.tolist() == [0, 1, 0]


@pytest.mark.parametrize("wide", [False, True])
def test_bits_of_x(wide):
    features = 300
    x = torch.randn(2, features, generator=torch.Generator().manual_seed(1))
    made, scale, sums = operands.bits(x, None, None, wide)
    assert made.shape == (2, 2, 1 + wide, 128)
    lanes = made.reshape(2, 2, 1 + wide, 8, 4, 2, 2)  # row, block, pair of planes, g, q, plane / 8 % 2, s
    width = 24 if wide else 16
    planes = lanes.permute(0, 2, 5, 3, 1, 6, 4).reshape(2, -1, 16)[:, :width]  # [row, bit plane, word]
    bit = layout.unpack(planes.contiguous(), 512).long()  # [row, bit plane, feature]
    weight = 2 ** torch.arange(width)
    weight[-1] *= -1
    whole = (bit * weight[None, :, None]).sum(1)
    assert not whole[:, features:].any()
    assert (whole[:, :features] * scale.double()[:, None] - x).abs().max() <= scale.max() / 2
    low, high = (whole & 0xFFFF, whole >> 16) if wide else (whole, torch.zeros_like(whole))
    assert torch.equal(sums[:, 0, 0].long(), low.sum(1))
    if wide:
        assert torch.equal(sums[:, 0, 1].long(), high.sum(1))


@pytest.mark.parametrize(("entries", "slots"), [(1, 5), (7, 5), (200, 20), (configs.SEGMENT_SPAN, 1), (1300, 5)])
def test_segments(entries, slots):
    tenant = torch.randint(-1, slots + 1, (entries,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    order, starts, per_item = segments.plan_segments(tenant, 3 * entries, slots, tenant.device)
    key = torch.where((tenant >= 0) & (tenant < slots), tenant, slots)
    assert per_item == 3
    assert torch.equal(order.long(), torch.sort(key, stable=True).indices)
    assert torch.equal(starts.long(), torch.tensor([int((key < slot).sum()) for slot in range(slots + 2)]))


def test_segments_where_the_index_does_not_divide_the_rows():
    order, starts, per_item = segments.plan_segments(torch.tensor([1, 0], dtype=torch.int32), 5, 2, torch.device("cpu"))
    assert per_item == 1
    assert order.tolist() == [2, 3, 4, 0, 1]  # row 4 shares the last entry
    assert starts.tolist() == [0, 3, 5, 5]


@pytest.mark.parametrize(
    ("slots", "planes", "outputs", "features", "column", "rank"),
    [(3, 1, 50, 384, False, 0), (2, 2, 33, 100, True, 3), (1, 1, 17, 1500, False, 0)],
)
def test_embedding(bank, packed, slots, planes, outputs, features, column, rank):
    tensors = bank(slots, planes, outputs, features, column=column, rank=rank)
    ids = torch.randint(0, outputs, (6, 5), generator=torch.Generator().manual_seed(3))
    tenant = None if slots == 1 else torch.tensor([1, -1, 0, 9, 1, -3], dtype=torch.int32)
    signs = packed(tensors, features)
    found = delta_embedding.delta_embedding(ids, *signs, tenant, features, torch.float32)
    expected = reference.delta_embedding(ids, *tensors, tenant, embedding_dim=features)
    assert (found.double() - expected).abs().max() < 1e-5
    table = torch.randn(outputs, features)
    whole = delta_embedding.delta_embedding(ids, *signs, tenant, features, torch.float32, table)
    assert (whole.double() - expected - table[ids]).abs().max() < 1e-5
    outside = torch.tensor([-1, outputs])
    assert not delta_embedding.delta_embedding(outside, *signs, tenant, features, torch.float32, table).any()
