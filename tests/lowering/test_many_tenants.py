"""The compiled delta op with a row index: which rows share a tenant, and in which order, changes no result."""

from __future__ import annotations

import pytest
import torch
from bitdelta_compile.kernels import reference
from bitdelta_compile.kernels.testing import random_bank
from bitdelta_compile.lowering import inductor, ops
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

SLOTS = 8
ROWS = 24
POPULARITY = {
    "distinct": [5, 0, 7, 2, -1, 3, 6, 1, 4],
    "uniform": [5, 0, 3, 2, 7, 5, 1, 1, 6, 0, 4, -1],
    "zipf": [2, 0, 2, 2, 5, 2, 0, 2, 2, 1, 0, 2],
    "identical": [3] * 12,
    "skewed": [4, 4, 4, 4, 4, 4, 1, 4, 4, 4, 4, 4],
    "base": [-1] * 12,
}


def bank(outputs, features, **extras):
    return list(random_bank(SLOTS, extras.pop("planes", 1), outputs, features, **extras))


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend=lambda gm, inputs: inductor.compile_graph(gm, inputs, options))


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def entries(popularity):
    """The row index of ROWS rows: the pattern over and over."""
    pattern = POPULARITY[popularity]
    return torch.tensor([pattern[row % len(pattern)] for row in range(ROWS)], dtype=torch.int32)


@pytest.fixture(scope="module", params=[(7, 31, {}), (200, 1100, {"planes": 2, "column": True, "rank": 3})])
def layer(request):
    """`layer(x, tenant)`, one compilation for all popularities and two threads; and its bank."""
    outputs, features, extras = request.param
    tensors = bank(outputs, features, **extras)
    run = compiled(lambda x, tenant: ops.delta_linear(x, *tensors, tenant), **{"cpp.threads": 2})
    return run, tensors, features


@pytest.mark.parametrize("popularity", POPULARITY)
def test_each_row_by_its_tenant_alone(layer, popularity):
    run, tensors, features = layer
    tenant = entries(popularity)
    used = sorted({*tenant.tolist()} - {-1})
    kept = [None if tensor is None else tensor.clone() for tensor in tensors]
    for slot in set(range(SLOTS)) - set(used):
        for tensor in tensors[1:]:
            if tensor is not None:
                tensor[slot] = torch.nan
    x = torch.randn(ROWS, features)
    try:
        found = run(x, tenant)
    finally:
        for tensor, before in zip(tensors, kept, strict=True):
            if tensor is not None:
                tensor.copy_(before)
    assert error(found, reference.delta_linear(x, *tensors, tenant)) < 2e-6
    assert found[tenant < 0].eq(0).all()
    for row in (0, 1, 11, ROWS - 1):
        strangers = torch.randint(-1, SLOTS, (ROWS,), dtype=torch.int32)
        strangers[row] = tenant[row]
        noise = torch.randn(ROWS, features)
        noise[row] = x[row]
        assert torch.equal(run(noise, strangers)[row], found[row])


def test_scattered_rows_give_what_neighbours_give(layer):
    run, _, features = layer
    x = torch.randn(ROWS, features)
    tenant = torch.arange(ROWS, dtype=torch.int32) % 3
    order = tenant.argsort(stable=True)
    assert torch.equal(run(x, tenant)[order], run(x[order].contiguous(), tenant[order].contiguous()))


def test_consumers_of_scattered_rows_are_fused():
    tensors = bank(70, 100)

    def layer(x, residual, tenant):
        return torch.relu(residual + ops.delta_linear(x, *tensors, tenant))

    run = compiled(layer)
    x, residual = torch.randn(ROWS, 100), torch.randn(ROWS, 70)
    tenant = entries("zipf")
    found, (code,) = run_and_get_code(run, x, residual, tenant)
    assert "delta_linear" in code
    assert error(found, torch.relu(residual + reference.delta_linear(x, *tensors, tenant))) < 2e-6


def test_what_a_tenant_lacks_adds_nothing():
    tensors = bank(70, 600, planes=2, rank=2)
    signs, row_scale, _, left, right = tensors
    row_scale[1, 1], row_scale[2] = 0, 0
    left[2], right[2] = 0, 0
    right[3] = 0
    run = compiled(lambda x, tenant: ops.delta_linear(x, *tensors, tenant))
    x = torch.randn(ROWS, 600)
    tenant = torch.arange(ROWS, dtype=torch.int32) % 4
    found = run(x, tenant)
    assert error(found, reference.delta_linear(x, *tensors, tenant)) < 2e-6
    assert found[tenant == 2].eq(0).all()
    fewer = compiled(lambda x, tenant: ops.delta_linear(x, signs[:, :1], row_scale[:, :1], None, left, right, tenant))
    assert torch.equal(fewer(x, tenant)[tenant == 1], found[tenant == 1])


def layer_of(weight, bias, tensors):
    def layer(x, tenant):
        delta = ops.delta_linear(x, *tensors, tenant)
        return torch.nn.functional.linear(x, weight, bias) + delta

    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("biased", [False, True])
def test_the_base_beside_it(rows, dtype, biased):
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("no bf16 dot products: the library's linear is kept")
    tensors = bank(70, 100)
    weight, bias = torch.randn(70, 100).to(dtype), torch.randn(70).to(dtype) if biased else None
    run = compiled(layer_of(weight, bias, tensors), **{"cpp.threads": 2})
    x, tenant = torch.randn(rows, 100).to(dtype), torch.arange(rows, dtype=torch.int32) % SLOTS - 1
    found, (code,) = run_and_get_code(run, x, tenant)
    assert "PackedRows" in code
    assert "extern_kernels." not in code
    expected = x.double() @ weight.double().T + reference.delta_linear(x, *tensors, tenant)
    if bias is not None:
        expected = expected + bias.double()
    assert error(found, expected) < {torch.float32: 2e-6, torch.bfloat16: 6e-3}[dtype]
    others = torch.randn(rows, 100).to(dtype)
    others[-1] = x[-1]
    assert torch.equal(run(others, tenant)[-1], found[-1])


def test_the_base_in_bf16_where_code_is_compiled_for_narrower_instructions():
    """AVX2 has no dot products of bf16, whatever the machine that compiles has: the library's linear is kept."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("no bf16 dot products: the library's linear is kept anyway")
    tensors, weight = bank(70, 100), torch.randn(70, 100).bfloat16()
    run = compiled(layer_of(weight, None, tensors), **{"cpp.simdlen": 256})
    x, tenant = torch.randn(5, 100).bfloat16(), torch.arange(5, dtype=torch.int32) % SLOTS - 1
    found, (code,) = run_and_get_code(run, x, tenant)
    assert "PackedRows" not in code
    expected = x.double() @ weight.double().T + reference.delta_linear(x, *tensors, tenant)
    assert error(found, expected) < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_of_any_number_of_rows_in_one_graph(dtype):
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("no bf16 dot products: the library's linear is kept")
    tensors, graphs = bank(70, 100), []

    def backend(gm, inputs):
        graphs.append(gm)
        return inductor.compile_graph(gm, inputs, {"cpp.threads": 2})

    weight, bias = torch.randn(70, 100).to(dtype), torch.randn(70).to(dtype)
    torch._dynamo.reset()
    run = torch.compile(layer_of(weight, bias, tensors), backend=backend)
    for rows in (5, 2, 31, 32, 33, 65, 200):
        x, tenant = torch.randn(rows, 100).to(dtype), torch.arange(rows, dtype=torch.int32) % SLOTS - 1
        for each in (x, tenant):
            torch._dynamo.maybe_mark_dynamic(each, 0)
        if not graphs:
            _, (code,) = run_and_get_code(run, x, tenant)
            assert "library_linear" in code
            assert "extern_kernels." not in code
        found = run(x, tenant)
        expected = x.double() @ weight.double().T + bias.double() + reference.delta_linear(x, *tensors, tenant)
        assert error(found, expected) < {torch.float32: 2e-6, torch.bfloat16: 6e-3}[dtype]
        others = torch.randn(rows, 100).to(dtype)
        others[-1] = x[-1]
        assert torch.equal(run(others, tenant)[-1], found[-1])
    assert len(graphs) == 1


def test_the_base_keeps_the_librarys_linear_where_rows_are_many_or_there_is_no_delta():
    tensors = bank(70, 100)
    weight = torch.randn(70, 100)
    tenant = torch.zeros(64, dtype=torch.int32)
    _, (code,) = run_and_get_code(compiled(layer_of(weight, None, tensors)), torch.randn(64, 100), tenant)
    assert "extern_kernels." in code
    plain = compiled(lambda x: torch.nn.functional.linear(x, weight))
    _, (code,) = run_and_get_code(plain, torch.randn(2, 100))
    assert "PackedRows" not in code


def test_a_weight_in_another_layout_keeps_the_librarys_linear():
    tensors = bank(70, 100)
    weight = torch.randn(100, 70)
    run = compiled(lambda x, tenant: x @ weight + ops.delta_linear(x, *tensors, tenant))
    x, tenant = torch.randn(2, 100), torch.tensor([1, 3], dtype=torch.int32)
    found, (code,) = run_and_get_code(run, x, tenant)
    assert "PackedRows" not in code
    assert error(found, x.double() @ weight.double() + reference.delta_linear(x, *tensors, tenant)) < 2e-6


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_autotuning_picks_one_of_both():
    tensors = bank(70, 100)
    weight = torch.randn(70, 100)
    x, tenant = torch.randn(4, 100), torch.tensor([1, 3, -1, 1], dtype=torch.int32)
    with config.patch(autotune_local_cache=False, autotune_remote_cache=False):
        run = compiled(layer_of(weight, None, tensors), max_autotune=True)
        found, (code,) = run_and_get_code(run, x, tenant)
    assert "PackedRows" in code or "extern_kernels." in code
    expected = x.double() @ weight.double().T + reference.delta_linear(x, *tensors, tenant)
    assert error(found, expected) < 2e-6
