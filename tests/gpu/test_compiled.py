"""Compiled ops on the device: numerics, fusion, CUDA graphs, autotuning, packages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from bitdelta_compile.kernels import layout, reference
from bitdelta_compile.lowering import cache, inductor, ops, torch_internals
from torch import nn
from torch._inductor import select_algorithm
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import gelu, linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


class Layer(nn.Module):
    """gelu(base + delta) with the stacked delta as buffers."""

    def __init__(self, slots, outputs, features, dtype, *, planes=1, column=False, rank=0):
        super().__init__()
        generator = torch.Generator().manual_seed(outputs)
        canonical = layout.pack(torch.rand(slots, planes, outputs, features, generator=generator) < 0.5)
        self.canonical = canonical
        self.base = nn.Linear(features, outputs).to(dtype).requires_grad_(requires_grad=False)
        self.register_buffer("signs", layout.to_layout(canonical, features, layout.FRAGMENTS))
        self.register_buffer("row_scale", torch.rand(slots, planes, outputs) * 0.1)
        self.register_buffer("col_scale", torch.rand(slots, planes, features) + 0.5 if column else None)
        self.register_buffer("left", torch.randn(slots, outputs, rank).bfloat16() if rank else None)
        self.register_buffer("right", torch.randn(slots, rank, features).bfloat16() * 0.1 if rank else None)
        self.cuda()

    def forward(self, x, tenant):
        delta = ops.delta_linear(
            x, self.signs, self.row_scale, self.col_scale, self.left, self.right, tenant, layout=layout.FRAGMENTS
        )
        return gelu(self.base(x) + delta)

    def expected(self, x, tenant):
        packed = (self.canonical, self.row_scale, self.col_scale, self.left, self.right)
        packed = tuple(None if tensor is None else tensor.cpu() for tensor in packed)
        delta = reference.delta_linear(x.cpu(), *packed, tenant.cpu())
        return gelu(linear(x.cpu().double(), self.base.weight.cpu().double(), self.base.bias.cpu().double()) + delta)


def compiled(layer, *, dynamic=False, **options):
    torch._dynamo.reset()
    return torch.compile(layer, dynamic=dynamic, backend=lambda gm, inputs: inductor.compile_graph(gm, inputs, options))


def relative_error(found, expected):
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("extra", [{}, {"planes": 2, "column": True, "rank": 3}], ids=["plain", "all parts"])
def test_numerics_and_fusion(rows, dtype, extra):
    layer = Layer(4, 200, 640, dtype, **extra)
    x = torch.randn(rows, 640, dtype=dtype, device="cuda")
    tenant = ((torch.arange(rows) % 5) - 1).to(torch.int32).cuda()
    with torch.no_grad():
        found, (code,) = run_and_get_code(compiled(layer), x, tenant)
    assert relative_error(found, layer.expected(x, tenant)) < TOLERANCE[dtype]
    assert "torch.ops.bitdelta.delta_linear.default(" not in code.replace("target=torch.ops", "")
    assert "triton_tem" in code


@pytest.mark.parametrize("rows_of_an_entry", ["any number", "one"])
def test_any_number_of_rows_in_one_graph(rows_of_an_entry):
    layer = Layer(4, 200, 640, torch.bfloat16)
    run = compiled(layer, dynamic=True)
    with torch.no_grad():
        for rows in (4, 8, 40, 400):
            x, tenant = torch.randn(rows, 640, device="cuda").bfloat16(), torch.tensor([3, -1, 0, 3]).int().cuda()
            if rows_of_an_entry == "one":
                tenant = tenant.repeat(rows // 4)
            assert relative_error(run(x, tenant), layer.expected(x, tenant)) < 8e-3, rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (16, 16), (12, 2)])
def test_base_and_delta_in_one_launch(rows, slots, dtype):
    """Right, the same at every call, and what a row gets does not depend on the others."""
    layer = Layer(slots, 520, 4096, dtype)
    x = torch.randn(rows, 4096, dtype=dtype, device="cuda")
    tenant = ((torch.arange(rows) + 1) % (slots + 1) - 1).to(torch.int32).cuda()
    run = compiled(layer)
    with torch.no_grad():
        found, (code,) = run_and_get_code(run, x, tenant)
        assert "= base_delta_part(" in code
        assert relative_error(found, layer.expected(x, tenant)) < TOLERANCE[dtype]
        assert all(torch.equal(run(x, tenant), found) for _ in range(20))
        other = torch.full_like(tenant, -1)
        other[0] = tenant[0]
        assert torch.equal(run(x, other)[0], found[0])


def test_one_launch_under_a_cuda_graph():
    """What counts its programs is zero again after each: two linears, replayed."""
    layers = torch.nn.ModuleList([Layer(4, 512, 4096, torch.bfloat16), Layer(4, 520, 4096, torch.bfloat16)])

    def both(x, tenant):
        return tuple(layer(x, tenant) for layer in layers)

    run = compiled(both, **{"triton.cudagraphs": True})
    with torch.no_grad():
        for _ in range(5):
            x, tenant = torch.randn(4, 4096, device="cuda").bfloat16(), torch.randint(-1, 4, (4,)).int().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            for layer, found in zip(layers, run(x, tenant), strict=True):
                assert relative_error(found, layer.expected(x, tenant)) < 8e-3


@pytest.mark.parametrize("rows", [8, 512])
@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_autotuned(mode, rows):
    timed = {}

    def keep(timings, name, *rest):
        timed.setdefault(name, []).extend((type(choice).__name__, time) for choice, time in timings.items())

    select_algorithm.add_feedback_saver(keep)
    layer = Layer(8, 512, 1024, torch.bfloat16)
    run = compiled(
        layer, fx_graph_cache=False, autotune_local_cache=False, **torch_internals.inductor_mode_options(mode)
    )
    x, tenant = torch.randn(rows, 1024, device="cuda").bfloat16(), torch.arange(8).int().cuda()
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(run(x, tenant), layer.expected(x, tenant)) < 8e-3
    select_algorithm.clear_feedback_savers()
    assert {name for name, _ in timed["bitdelta_base_delta"]} == {"TritonTemplateCaller", "BaseThenDelta"}
    assert all(0 < time < 10 for _, time in timed["bitdelta_base_delta"])


def test_a_cuda_graph_reads_the_bank_where_it_is():
    """One record; a slot written between replays is seen; the bank is no input that is copied."""
    layer = Layer(4, 256, 512, torch.bfloat16)
    for tensor in (layer.signs, layer.row_scale, *layer.base.parameters()):
        torch._dynamo.mark_static_address(tensor)
    run = compiled(layer, **{"triton.cudagraphs": True})
    x, tenant = torch.randn(4, 512, device="cuda").bfloat16(), torch.tensor([0, 1, 2, -1]).int().cuda()
    with torch.no_grad():
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            run(x, tenant)
        so_far = torch_internals.compiled_so_far()
        assert so_far.records == 1
        fresh = torch.randint(-(2**31), 2**31, layer.signs[1].shape).int()
        layer.signs[1].copy_(fresh.cuda())
        layer.canonical[1].copy_(layout.from_layout(fresh, 256, 512, layout.FRAGMENTS))
        moved = torch.tensor([1, 1, -1, 3]).int().cuda()
        torch.compiler.cudagraph_mark_step_begin()
        found = run(x, moved).clone()
        assert torch_internals.compiled_so_far() == so_far
    assert relative_error(found, layer.expected(x, moved)) < 8e-3


def test_a_captured_graph_replays():
    layer = Layer(4, 256, 512, torch.bfloat16)
    x, tenant = torch.randn(4, 512, device="cuda").bfloat16(), torch.tensor([0, 1, 2, -1]).int().cuda()
    with torch.no_grad():
        layer(x, tenant)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(x, tenant)
        x.copy_(torch.randn(4, 512))
        tenant.copy_(torch.tensor([3, -1, 3, 0]))
        graph.replay()
    assert relative_error(found, layer.expected(x, tenant)) < 8e-3


def test_a_package_runs_without_this_package(tmp_path):
    layer = Layer(4, 200, 640, torch.bfloat16).eval()
    inductor.register_lowerings()
    x, tenant = torch.randn(4, 640, device="cuda").bfloat16(), torch.tensor([0, 1, 2, -1]).int().cuda()
    with torch.no_grad():
        program = torch.export.export(layer, (x, tenant))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2"), inductor_configs=cache.graph_passes({})
        )
        torch.save({"x": x, "tenant": tenant, "y": layer.expected(x, tenant)}, tmp_path / "expected.pt")
    script = f"""
import sys, torch
given = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
layer = torch._inductor.aoti_load_package({package!r})
found = layer(given["x"], given["tenant"]).cpu().double()
assert (found - given["y"]).norm() < 8e-3 * given["y"].norm()
assert "bitdelta_compile" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)
