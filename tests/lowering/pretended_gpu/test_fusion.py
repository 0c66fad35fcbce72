"""Base linear, delta and addition become one op where they may, and stay as they are everywhere else."""

from __future__ import annotations

import collections

import pytest
import torch
from bitdelta_compile.kernels import configs, layout
from bitdelta_compile.lowering import fusion, ops
from torch import Tensor
from torch._inductor import config
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import linear

pytest.importorskip("triton")
without_gpu = pytest.importorskip("without_gpu")

OUTPUTS, FEATURES, SLOTS = 48, 1024, 1
WEIGHT, BIAS = torch.randn(OUTPUTS, FEATURES).bfloat16(), torch.randn(OUTPUTS).bfloat16()
ROW_SCALE = torch.rand(SLOTS, 1, OUTPUTS)
FRAGMENTS = torch.zeros(SLOTS, 1, *layout.packed_shape(OUTPUTS, FEATURES, layout.FRAGMENTS), dtype=torch.int32)
CANONICAL = torch.zeros(SLOTS, 1, OUTPUTS, layout.words(FEATURES), dtype=torch.int32)


def x(*rows: int) -> Tensor:
    return torch.randn(*rows, FEATURES).bfloat16()


def delta(x: Tensor, signs: Tensor, row_scale: Tensor, **options: object) -> Tensor:
    return ops.delta_linear(x, signs, row_scale, None, None, None, None, **{"layout": layout.FRAGMENTS, **options})


def ops_after(function, *inputs, device="cuda", capability=90, **size):
    """How often each op stands in the graph of `function` on fake tensors like `inputs` once the pass has run."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    major, minor = divmod(capability, 10)
    with without_gpu.pretended_gpu(major=major, minor=minor):
        fakes = [
            without_gpu.on_gpu(mode, tensor, device=device, **(size if place == 0 or tensor.dim() == 1 else {}))
            for place, tensor in enumerate(inputs)
        ]
        with torch.no_grad():
            graph = make_fx(function, tracing_mode="symbolic" if size else "real")(*fakes).graph
        fusion.fuse_base_and_delta(graph)
    graph.lint()
    targets = (node.target for node in graph.nodes)
    return collections.Counter(each.overloadpacket.__name__ for each in targets if isinstance(each, OpOverload))


def fused(*args, **kwargs):
    found = ops_after(*args, **kwargs)
    assert found["base_delta_linear"] + found["delta_linear"] == 1
    assert (found["base_delta_linear"] == 1) == (found["mm"] + found["addmm"] + found["sum"] == 0)
    return found["base_delta_linear"] == 1


def with_bias(x, weight, bias, signs, scale):
    return linear(x, weight, bias) + delta(x, signs, scale)


def without_bias(x, weight, bias, signs, scale):
    return delta(x, signs, scale) + linear(x, weight)


def one_row(x, weight, bias, signs, scale):
    product = (x.view(1, FEATURES).unsqueeze(2) * weight.t().unsqueeze(0)).sum([1])
    return product.view(1, 1, OUTPUTS) + delta(x, signs, scale)


def one_row_in_fp32(x, weight, bias, signs, scale):
    convert = torch.ops.prims.convert_element_type
    row, turned = convert(x.view(1, FEATURES), torch.float32), convert(weight.t(), torch.float32)
    product = convert((row.unsqueeze(2) * turned.unsqueeze(0)).sum([1]), torch.bfloat16)
    return product.view(1, 1, OUTPUTS) + delta(x, signs, scale)


PACKED = (WEIGHT, BIAS, FRAGMENTS, ROW_SCALE)


@pytest.mark.parametrize(
    ("form", "given"),
    [
        (with_bias, x(4)),
        (with_bias, x(2, 2)),
        (without_bias, x(4)),
        (without_bias, x(4, 1)),
        (one_row, x(1, 1)),
        (one_row_in_fp32, x(1, 1)),
    ],
)
def test_forms_of_a_linear(form, given):
    assert fused(form, given, *PACKED)


def test_a_bias_is_kept():
    assert ops_after(with_bias, x(4), *PACKED) == {"base_delta_linear": 1, "add": 1}


def read_elsewhere(x, weight, bias, signs, scale):
    base = linear(x, weight, bias)
    return base + delta(x, signs, scale), base


def delta_read_elsewhere(x, weight, bias, signs, scale):
    mine = delta(x, signs, scale)
    return linear(x, weight, bias) + mine, mine


def another_x(x, weight, bias, signs, scale):
    return linear(x.neg(), weight, bias) + delta(x, signs, scale)


def scaled_sum(x, weight, bias, signs, scale):
    return torch.add(linear(x, weight, bias), delta(x, signs, scale), alpha=2)


def computed_weight(x, weight, bias, signs, scale):
    return linear(x, weight.to(torch.int8).to(x.dtype) * 0.5, bias) + delta(x, signs, scale)


def stored_the_other_way(x, weight, bias, signs, scale):
    return x @ weight.view(FEATURES, OUTPUTS) + delta(x, signs, scale)


def not_rounded(x, weight, bias, signs, scale):
    return linear(x, weight, bias) + delta(x, signs, scale, exact=True)


def converted(x, weight, bias, signs, scale):
    product = torch.ops.prims.convert_element_type(linear(x, weight), torch.float32)
    return product + delta(x.float(), signs, scale)


def broadcast(x, weight, bias, signs, scale):
    return linear(x, weight, bias).view(4, 1, OUTPUTS) + delta(x, signs, scale)


@pytest.mark.parametrize(
    "form",
    [
        read_elsewhere,
        delta_read_elsewhere,
        another_x,
        scaled_sum,
        computed_weight,
        stored_the_other_way,
        not_rounded,
        converted,
        broadcast,
    ],
)
def test_forms_that_are_left_alone(form):
    assert not fused(form, x(4), *PACKED)


def canonical(x, weight, bias, signs, scale):
    return linear(x, weight, bias) + delta(x, signs, scale, layout=layout.CANONICAL)


def test_facts_that_leave_the_graph_alone():
    assert not fused(canonical, x(4), WEIGHT, BIAS, CANONICAL, ROW_SCALE)
    assert not fused(with_bias, x(4), *PACKED, device="cpu")
    assert not fused(with_bias, x(configs.DECODE_ROWS + 1), *PACKED)
    assert not fused(with_bias, x(4), *PACKED, capability=100)
    assert not fused(with_bias, x(4), *PACKED, capability=75)
    wide = (WEIGHT.float(), BIAS.float(), FRAGMENTS, ROW_SCALE)
    assert not fused(with_bias, x(4).float(), *wide)
    with config.patch(max_autotune=True):
        assert fused(with_bias, x(4).float(), *wide)
        assert fused(with_bias, x(configs.DECODE_ROWS + 1), *PACKED)
        assert fused(with_bias, x(4), *PACKED, capability=100)
        assert not fused(with_bias, x(4), *PACKED, capability=75)


def test_any_number_of_rows():
    """Up to a bound, or one of each entry of an index; only where both ways are timed may they be tokens of prompts."""
    assert not fused(with_bias, x(4), *PACKED, dynamic=0)
    assert not fused(with_bias, x(4), *PACKED, dynamic=0, most=configs.DECODE_ROWS + 1)
    assert fused(with_bias, x(4), *PACKED, dynamic=0, most=configs.DECODE_ROWS)

    def indexed(x, tenant, weight, signs, scale):
        mine = ops.delta_linear(x, signs, scale, None, None, None, tenant, layout=layout.FRAGMENTS)
        return linear(x, weight) + mine

    entries = torch.zeros(4, dtype=torch.int32)
    assert fused(indexed, x(4), entries, WEIGHT, *PACKED[2:], dynamic=0, one_size=True)
    assert not fused(indexed, x(4), entries, WEIGHT, *PACKED[2:], dynamic=0)
    with config.patch(max_autotune=True):
        for each in (1, configs.MOST_ROWS_EACH, configs.MOST_ROWS_EACH + 1):
            assert fused(indexed, x(4, each), entries, WEIGHT, *PACKED[2:], dynamic=0, one_size=True)
