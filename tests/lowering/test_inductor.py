"""Compiled ops against the reference: every dtype, any batch size, fused consumers, caching, packaging."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from bitdelta_compile.kernels import reference
from bitdelta_compile.kernels.testing import random_bank
from bitdelta_compile.lowering import cache, fusion, inductor, ops
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def compiled(function, **options):
    """`function` under Inductor with our lowerings, and the list of graphs it took."""
    torch._dynamo.reset()
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return inductor.compile_graph(gm, example_inputs, options)

    return torch.compile(function, backend=backend), graphs


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(
    ("dtype", "planes", "column", "rank"),
    [
        (torch.float32, 1, False, 0),
        (torch.float32, 3, True, 2),
        (torch.bfloat16, 1, False, 0),
        (torch.bfloat16, 2, True, 3),
        (torch.float16, 1, True, 0),
    ],
)
def test_any_number_of_rows_in_two_graphs_with_base_and_activation_fused(dtype, planes, column, rank):
    tensors = random_bank(1, planes, 70, 100, column=column, rank=rank)
    base = nn.Linear(100, 70).to(dtype).requires_grad_(requires_grad=False)

    def layer(x):
        return nn.functional.gelu(base(x) + ops.delta_linear(x, *tensors, None))

    run, graphs = compiled(layer)
    for batch in (1, 2, 3, 8, 64):
        x = torch.randn(batch, 3, 100, dtype=dtype)
        wide = x.double() @ base.weight.double().T + base.bias.double() + reference.delta_linear(x, *tensors)
        assert relative_error(run(x), nn.functional.gelu(wide)) < TOLERANCE[dtype], batch
    assert len(graphs) == 2


def test_no_call_out_of_the_generated_code():
    tensors = random_bank(1, 1, 40, 64)
    table = random_bank(1, 1, 30, 64)
    weight = torch.randn(30, 64)

    def layer(ids):
        x = nn.functional.embedding(ids, weight)
        x = x + ops.delta_embedding(ids, *table, None, embedding_dim=64, dtype=torch.float32)
        return torch.relu(ops.delta_linear(x, *tensors, None) + 1)

    run, _ = compiled(layer)
    _, (code,) = run_and_get_code(run, torch.randint(30, (4, 5)))
    assert "torch.ops.bitdelta" not in code
    assert re.search(r"cpp_fused_\w*delta_linear\w*relu", code), "the activation is not fused into the op's kernel"


def test_a_result_that_others_read_too_is_kept():
    tensors = random_bank(1, 1, 40, 64)

    def layer(x):
        delta = ops.delta_linear(x, *tensors, None)
        return torch.relu(delta + 1), delta, delta @ torch.ones(40, 2)

    run, _ = compiled(layer)
    x = torch.randn(20, 64)
    for found, expected in zip(run(x), layer(x), strict=True):
        assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize(("outputs", "features"), [(1, 1), (7, 31), (17, 33), (65, 384)])
@pytest.mark.parametrize("rows", [5, 40])
def test_ragged_shapes(outputs, features, rows):
    tensors = random_bank(1, 2, outputs, features)
    run, _ = compiled(lambda x: ops.delta_linear(x, *tensors, None))
    x = torch.randn(features, rows).T  # not contiguous
    assert relative_error(run(x), reference.delta_linear(x, *tensors)) < 2e-6


@pytest.mark.parametrize("rows_per_entry", [1, 9])
def test_rows_of_many_tenants_do_not_meet(rows_per_entry):
    tensors = random_bank(3, 1, 70, 100, column=True, rank=2)
    tensors[1][1] = float("nan")  # an unused slot
    run, graphs = compiled(lambda x, tenant: ops.delta_linear(x, *tensors, tenant))
    x = torch.randn(6, rows_per_entry, 100)
    index = torch.tensor([2, -1, 0, 0, 3, -7], dtype=torch.int32)
    found = run(x, index)
    expected = reference.delta_linear(x, *(t[[0, 2]] for t in tensors), torch.tensor([1, -1, 0, 0, -1, -1]))
    assert relative_error(found, expected) < 2e-6
    assert found[[1, 4, 5]].eq(0).all()
    alone = run(x, torch.tensor([2, 0, -1, 2, 0, 2], dtype=torch.int32))
    assert torch.equal(alone[0], found[0])
    assert len(graphs) == 1


def test_a_row_index_that_does_not_fit_gives_a_defined_result():
    tensors = random_bank(3, 1, 40, 64)
    table = random_bank(3, 1, 50, 64)

    def layer(x, ids, tenant):
        looked_up = ops.delta_embedding(ids, *table, tenant, embedding_dim=64, dtype=torch.float32)
        return ops.delta_linear(x, *tensors, tenant), looked_up

    run, graphs = compiled(layer)
    index = torch.tensor([0, 1, 2], dtype=torch.int32)
    for rows in (6, 9):
        run(torch.randn(rows, 64), torch.randint(50, (rows,)), index)
    x = torch.randn(7, 64)
    found, looked_up = run(x, torch.randint(50, (7,)), index)
    assert torch.equal(found[:6], run(x, torch.randint(50, (7,)), index)[0][:6])
    assert found[6].eq(0).all()  # past the index: the base
    assert looked_up.isfinite().all()
    few, _ = run(x[:2], torch.randint(50, (2,)), index)
    assert relative_error(few[1], reference.delta_linear(x[1:2], *tensors, torch.tensor([1]))[0]) < 2e-6
    assert len(graphs) == 2


@pytest.mark.parametrize("batch", [0, 5])
def test_no_rows_and_wider_scales(batch):
    signs, row_scale, *_ = random_bank(1, 1, 40, 64)
    run, _ = compiled(lambda x: ops.delta_linear(x, signs, row_scale.double(), None, None, None, None))
    x = torch.randn(batch, 64)
    assert run(x).shape == (batch, 40)
    assert relative_error(run(x), reference.delta_linear(x, signs, row_scale)) < 2e-6


@pytest.mark.parametrize("index", [False, True])
def test_embedding(index):
    table = random_bank(3 if index else 1, 2, 50, 100, column=True, rank=2)
    tenant = torch.tensor([2, -1, 0, 9], dtype=torch.int32) if index else None

    def lookup(ids):
        return ops.delta_embedding(ids, *table, tenant, embedding_dim=100, dtype=torch.float32)

    run, _ = compiled(lookup)
    ids = torch.randint(50, (4, 7))
    assert relative_error(run(ids), reference.delta_embedding(ids, *table, tenant, embedding_dim=100)) < 1e-6


@pytest.mark.parametrize(("lanes", "dtype"), [(1, torch.float32), (256, torch.bfloat16)])
def test_narrower_instruction_sets(lanes, dtype):
    tensors = random_bank(1, 1, 70, 100)
    run, _ = compiled(lambda x: torch.relu(ops.delta_linear(x, *tensors, None)), **{"cpp.simdlen": lanes})
    for rows in (3, 30):
        x = torch.randn(rows, 100).to(dtype)
        assert relative_error(run(x), reference.delta_linear(x, *tensors).relu()) < TOLERANCE[dtype]


def test_gradients_of_a_compiled_layer():
    signs, row_scale, *_ = random_bank(1, 1, 40, 64)
    x = torch.randn(5, 64, requires_grad=True)
    row_scale.requires_grad_()

    def loss(x, row_scale):
        return ops.delta_linear(x, signs, row_scale, None, None, None, None).square().sum()

    run, _ = compiled(loss)
    expected = torch.autograd.grad(loss(x, row_scale), (x, row_scale))
    for found, wanted in zip(torch.autograd.grad(run(x, row_scale), (x, row_scale)), expected, strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_our_sources_are_part_of_the_cache_key(monkeypatch):
    tensors = random_bank(1, 1, 33, 47)
    x = torch.randn(4, 47)

    def hits():
        counters.clear()
        with config.patch(fx_graph_cache=True), torch._functorch.config.patch(enable_autograd_cache=False):
            compiled(lambda x: ops.delta_linear(x, *tensors, None) * 3)[0](x)
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    monkeypatch.setattr(cache, "source_digest", lambda: f"edited {id(monkeypatch)} {torch.rand(1).item()}"[:30])
    first = cache.source_digest()
    monkeypatch.setattr(cache, "source_digest", lambda: first)
    assert hits() == (0, 1)
    assert hits() == (1, 0)
    monkeypatch.setattr(cache, "source_digest", lambda: first + "again")
    assert hits() == (0, 1)


def test_digest_follows_the_files(tmp_path, monkeypatch):
    before = cache.source_digest.__wrapped__()
    copy = tmp_path / "kernels"
    copy.mkdir()
    for path in cache.FOLDERS[1].iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cache, "FOLDERS", (cache.FOLDERS[0], copy))
    assert cache.source_digest.__wrapped__() == before
    (copy / "cpu_tile.h").write_text("edited")
    assert cache.source_digest.__wrapped__() != before


def test_configured_passes_still_run_beside_ours(monkeypatch):
    seen = []
    monkeypatch.setattr(fusion, "fuse_base_and_delta", lambda graph: seen.append("ours"))
    theirs = {f"post_grad_custom_{name}_pass": lambda graph, name=name: seen.append(name) for name in ("pre", "post")}
    tensors = random_bank(1, 1, 20, 32)
    run, _ = compiled(lambda x: ops.delta_linear(x, *tensors, None), **theirs)
    run(torch.randn(2, 32))
    assert seen == ["pre", "ours", "post"]


def test_ours_follows_the_passes_it_is_put_beside_and_has_their_names():
    class Named(CustomGraphPass):
        def __call__(self, graph):
            seen.append(graph)

        def uuid(self):
            return "named"

    seen, graph = [], torch.fx.Graph()
    slot = "post_grad_custom_pre_pass"
    for given in (Named(), [Named()]):
        (found,) = cache.graph_passes({slot: given}).values()
        found(graph, False)
        assert found.uuid() == (cache.source_digest(), "named")
    assert seen == [graph, graph]
    (anonymous,) = cache.graph_passes({slot: seen.append}).values()
    assert anonymous.uuid() is None


def test_an_op_that_no_device_has_a_kernel_for_is_the_two_it_stands_for():
    tensors, weight = random_bank(1, 1, 20, 32), torch.randn(20, 32)
    run, _ = compiled(lambda x: torch.relu(ops.base_delta_linear(x, weight, *tensors, None)))
    x = torch.randn(3, 2, 32)
    expected = torch.relu(x.double() @ weight.double().T + reference.delta_linear(x, *tensors))
    found, (code,) = run_and_get_code(run, x)
    assert relative_error(found, expected) < 2e-6
    assert "torch.ops.bitdelta" not in code


def test_a_package_runs_without_this_package(tmp_path, monkeypatch):
    seen, ours = [], fusion.fuse_base_and_delta
    monkeypatch.setattr(fusion, "fuse_base_and_delta", lambda graph: (seen.append(graph), ours(graph)))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(100, 40)
            signs, row_scale, *_ = random_bank(1, 1, 40, 100)
            self.register_buffer("signs", signs)
            self.register_buffer("row_scale", row_scale)

        def forward(self, x):
            return torch.relu(self.base(x) + ops.delta_linear(x, self.signs, self.row_scale, None, None, None, None))

    layer = Layer().eval()
    inductor.register_lowerings()
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=512)
        program = torch.export.export(layer, (torch.randn(3, 100),), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2"), inductor_configs=cache.graph_passes({})
        )
        rows = torch.randn(50, 100)
        torch.save({"x": rows, "y": layer(rows)}, tmp_path / "expected.pt")
    assert len(seen) == 1
    script = f"""
import sys, torch
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
layer = torch._inductor.aoti_load_package({package!r})
for rows in (1, 7, 50):
    torch.testing.assert_close(layer(expected["x"][:rows]), expected["y"][:rows])
assert "bitdelta_compile" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)


@pytest.mark.parametrize("exact", [False, True])
def test_bf16_rows_are_rounded_unless_exactness_is_asked_for(exact):
    tensors = random_bank(1, 1, 64, 512)
    run, _ = compiled(lambda x: ops.delta_linear(x, *tensors, None, exact=exact))
    found, (code,) = run_and_get_code(run, x := torch.randn(4, 512).bfloat16())
    assert re.findall(r"delta_tile<bitdelta::(\w+)>\(delta", code) == ["ExactSums" if exact else "RoundedSums"]
    assert relative_error(found, reference.delta_linear(x, *tensors)) < TOLERANCE[torch.bfloat16]


def test_other_dtypes_fall_back_to_the_eager_kernel():
    tensors = random_bank(1, 1, 20, 32)
    run, _ = compiled(lambda x: ops.delta_linear(x, *tensors, None) + 1)
    x = torch.randn(2, 32, dtype=torch.float64)
    assert relative_error(run(x), reference.delta_linear(x, *tensors) + 1) < 1e-12
