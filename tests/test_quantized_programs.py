"""Programs and packages over a quantized base: linears stay the library's own, and merging needs no more than that."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import bitdelta_compile as bdc
from bitdelta_compile.errors import BaseMismatchError, BitDeltaError
from bitdelta_compile.quantized import is_quantized, plain_parameters

Quantize = Callable[[nn.Module, str], nn.Module]

V, K, N = 100, 64, 96
SHAPES = {"ids": {0: Dim("batch", min=1, max=64)}}
NAMES = ("a", "b", "c")


class Net(nn.Module):
    """Two linears of one weight, one that `a` leaves as it is, and one too small for planes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, K)
        self.up = nn.Linear(K, N)
        self.left = nn.Linear(N, N)
        self.right = nn.Linear(N, N)
        self.right.weight = self.left.weight
        self.small = nn.Linear(N, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.table(ids)).relu()
        return self.small(self.right(self.left(x).relu()).tanh())


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, 6), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["int8", "int4 packed"])
def base(request: pytest.FixtureRequest, quantize: Quantize) -> nn.Module:
    model = quantize(net(), request.param)
    model.right.weight = model.left.weight
    return model


@pytest.fixture(scope="module")
def deltas(base: nn.Module) -> dict[str, bdc.Delta]:
    found = {}
    for seed, name in enumerate(NAMES):
        tuned = net()
        torch.manual_seed(seed + 1)
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        if name == "a":
            tuned.table.weight = base.table.weight
        found[name] = bdc.compress(base, tuned, [{"ids": tokens(64)}], quality="fast")
    return found


@pytest.fixture(scope="module")
def programs(base: nn.Module, deltas: dict[str, bdc.Delta]) -> dict[str, ExportedProgram]:
    return {name: bdc.export(base, (tokens(3),), delta=deltas[name], dynamic_shapes=SHAPES) for name in ("a", "b")}


def expected(base: nn.Module, delta: bdc.Delta | None, ids: Tensor) -> Tensor:
    model = net()
    if delta is None:
        return base(ids)
    model.load_state_dict(dict(delta.materialize(base, dtype=torch.float32)), strict=False)
    return model(ids)


def check(found: Tensor, base: nn.Module, deltas: dict[str, bdc.Delta], names: list[str | None], ids: Tensor) -> None:
    before = base(ids)
    for row, name in enumerate(names):
        delta = None if name is None else deltas[name]
        wanted = expected(base, delta, ids)[row]
        gap = wanted.norm() if delta is None else (wanted - before[row]).norm()
        assert (found[row] - wanted).norm() < 1e-4 * gap


def linears(program: ExportedProgram) -> int:
    return len(program.graph.find_nodes(op="call_function", target=torch.ops.bitdelta.base_linear.default))


def test_a_module_is_as_before_once_it_is_exported(base: nn.Module) -> None:
    weight = base.left.weight
    with plain_parameters(base) as quantized:
        assert quantized.keys() == {"up.weight", "left.weight", "right.weight", "small.weight"}
        assert type(base.left.weight) is nn.Parameter
        assert base.left.weight is base.right.weight
    assert base.left.weight is base.right.weight is weight
    with pytest.raises(Exception, match="ids"):
        bdc.export(base, ("no tokens",), delta={}, dynamic_shapes=SHAPES)
    assert base.left.weight is weight


def test_base_linear_is_what_the_weights_class_says(base: nn.Module) -> None:
    x = torch.randn(2, 3, K)
    for layer in (base.up, net().up):
        found = torch.ops.bitdelta.base_linear(x, layer.weight, layer.bias)
        assert torch.equal(found, layer(x))
        torch.testing.assert_close(torch.ops.bitdelta.base_linear(x, layer.weight), layer(x) - layer.bias)


def test_a_program_of_one_fine_tune(
    base: nn.Module, deltas: dict[str, bdc.Delta], programs: dict[str, ExportedProgram]
) -> None:
    for name, program in programs.items():
        assert linears(program) == 3  # up, left, right; the small one has its tuned tensor
        assert is_quantized(program.state_dict["left.weight"])
        for rows in (1, 4):
            ids = tokens(rows, rows)
            check(program.module()(ids), base, deltas, [name] * rows, ids)


def test_programs_are_saved_merged_and_packaged(
    base: nn.Module, deltas: dict[str, bdc.Delta], programs: dict[str, ExportedProgram], tmp_path: Path
) -> None:
    bdc.save_program(programs["a"], tmp_path / "a.pt2")
    bdc.save_program(programs["b"], tmp_path / "b.pt2", base="elsewhere")
    whole = bdc.load_program(tmp_path / "a.pt2")
    ids = tokens(3, 3)
    check(whole.module()(ids), base, deltas, ["a"] * 3, ids)
    filled = bdc.load_program(tmp_path / "b.pt2", base=base)
    check(filled.module()(ids), base, deltas, ["b"] * 3, ids)
    with pytest.raises(BaseMismatchError, match="is not the base"):
        bdc.load_program(tmp_path / "b.pt2", base=net())
    merged = bdc.merge({"a": whole, "b": filled}, slots=3)
    assert linears(merged) == 3
    index = torch.tensor([1, -1, 0], dtype=torch.int32)
    check(merged.module()(ids, tenant=index), base, deltas, ["b", None, "a"], ids)
    if type(base.up.weight).__name__ != "Int8Tensor":  # its package differs in the constants alone
        return
    bdc.package(merged, tmp_path / "tenants.pt2")
    package = bdc.load_package(tmp_path / "tenants.pt2")
    package.add("c", deltas["c"])
    for names in (["c", None, "a"], ["b", "c", "c", None]):
        ids = tokens(len(names), len(names))
        check(package(ids, tenants=names), base, deltas, names, ids)
    plain = net()
    foreign = bdc.compress(plain, copy.deepcopy(plain), method="mean_abs")
    with pytest.raises(BaseMismatchError, match=r"made for another base.*(up|left|small)\.weight"):
        package.replace("a", foreign)


def test_programs_of_different_quantized_bases_do_not_merge(
    base: nn.Module, quantize: Quantize, programs: dict[str, ExportedProgram], deltas: dict[str, bdc.Delta]
) -> None:
    other = net()
    with torch.no_grad():
        other.up.weight *= 1.01
    other = quantize(other, "int8")
    other.right.weight = other.left.weight
    delta = bdc.compress(other, net(), method="mean_abs")
    program = bdc.export(other, (tokens(3),), delta=delta, dynamic_shapes=SHAPES)
    with pytest.raises(BaseMismatchError, match="different bases"):
        bdc.merge({"a": programs["a"], "b": program})


def test_many_tenants_are_exported_at_once(base: nn.Module, deltas: dict[str, bdc.Delta]) -> None:
    both = {name: deltas[name] for name in ("a", "b")}
    program = bdc.export(base, (tokens(3),), delta=both, dynamic_shapes=SHAPES)
    ids = tokens(4, 1)
    index = torch.tensor([0, 1, -1, 0], dtype=torch.int32)
    check(program.module()(ids, tenant=index), base, deltas, ["a", "b", None, "a"], ids)


def test_a_program_without_its_library(
    programs: dict[str, ExportedProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bdc.save_program(programs["a"], tmp_path / "a.pt2")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BitDeltaError, match="install torchao"):
        bdc.load_program(tmp_path / "a.pt2")
