"""Programs of one fine-tune and of many: what they compute, what they refuse, how they are saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bitdelta_compile.compress import compress
from bitdelta_compile.delta import Delta
from bitdelta_compile.errors import BaseMismatchError, BitDeltaError, UnsupportedError
from bitdelta_compile.programs import program as programs
from bitdelta_compile.programs.export import export
from bitdelta_compile.programs.merge import merge
from bitdelta_compile.programs.program import About, load_program, save_program

V, K = 50, 96


class Model(nn.Module):
    """A table tied to its head, a bias, a norm, a buffer, keyword inputs and a nested output."""

    def __init__(self, vocabulary: int = V, scale: float = 2.0) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, K)
        self.middle = nn.Linear(K, K)
        self.norm = nn.LayerNorm(K)
        self.head = nn.Linear(K, vocabulary, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(K, K)
        self.register_buffer("scale", torch.tensor([scale, 1.0]), persistent=False)

    def forward(self, ids: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.middle(self.table(ids)).tanh()) * mask.unsqueeze(-1)
        return {"logits": self.head(x) * self.scale[0], "hidden": x}


def perturbed(base: nn.Module, seed: int, scale: float = 0.02) -> nn.Module:
    tuned = copy.deepcopy(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += scale * torch.randn_like(parameter)
    return tuned


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def deltas(base: nn.Module) -> dict[str, Delta]:
    """Tenants whose encodings differ in planes and rank."""
    options: dict[str, dict[str, Any]] = {"a": {}, "b": {"planes": 2}, "c": {"rank": 1}}
    return {
        name: compress(base, perturbed(base, seed), method="mean_abs", **each)
        for seed, (name, each) in enumerate(options.items(), 1)
    }


SHAPES = {"ids": {0: (batch := Dim("batch", min=1, max=64)), 1: (length := Dim("length", min=1, max=16))}}
SHAPES |= {"mask": {0: batch, 1: length}}


def inputs(rows: int, columns: int = 5, seed: int = 0) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed + rows)
    mask = torch.rand(rows, columns, generator=generator)
    return (torch.randint(V, (rows, columns), generator=generator),), {"mask": mask}


def exported(base: nn.Module, delta: Any, **options: Any) -> ExportedProgram:
    args, kwargs = inputs(3)
    return export(base, args, kwargs, **({"dynamic_shapes": SHAPES} | options), delta=delta)


@pytest.fixture(scope="module")
def singles(base: nn.Module, deltas: Mapping[str, Delta]) -> dict[str, ExportedProgram]:
    return {name: exported(base, delta) for name, delta in deltas.items()}


@pytest.fixture(scope="module")
def merged(singles: Mapping[str, ExportedProgram]) -> ExportedProgram:
    return merge(singles)


def materialized(base: nn.Module, delta: Delta | None) -> nn.Module:
    model = copy.deepcopy(base)
    model.load_state_dict(dict(delta.materialize(base)) if delta is not None else {}, strict=False)
    return model


def check_rows(
    run: Any, base: nn.Module, deltas: Mapping[str, Delta], tenants: Sequence[str | None], names: Sequence[str]
) -> None:
    """Each row against its materialized fine-tune, as a share of the fine-tune's distance from the base."""
    args, kwargs = inputs(len(tenants), columns=3 + len(tenants))
    index = torch.tensor([-1 if name is None else names.index(name) for name in tenants], dtype=torch.int32)
    with torch.no_grad():
        found, plain = run(*args, **kwargs, tenant=index), base(*args, **kwargs)
        for row, name in enumerate(tenants):
            expected = materialized(base, deltas[name] if name is not None else None)(*args, **kwargs)
            for key, value in expected.items():
                gap = (value[row] - plain[key][row]).norm() if name is not None else plain[key][row].norm()
                assert gap > 0.1
                assert (found[key][row] - value[row]).norm() < 1e-4 * gap, (row, name, key)


def targets(program: ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_one_fine_tune(base: nn.Module, deltas: Mapping[str, Delta], singles: Mapping[str, ExportedProgram]) -> None:
    for name, delta in deltas.items():
        module = singles[name].module()
        for rows in (1, 2, 7):
            args, kwargs = inputs(rows)
            expected, plain = materialized(base, delta)(*args, **kwargs), base(*args, **kwargs)
            found = module(*args, **kwargs)
            assert list(found) == ["logits", "hidden"]
            for key, value in expected.items():
                assert (found[key] - value).norm() < 1e-4 * (value - plain[key]).norm()


def test_the_graph_shows_base_and_packed_nodes_with_names(singles: Mapping[str, ExportedProgram]) -> None:
    program = singles["c"]
    found = targets(program)
    ops = torch.ops
    assert found.count(ops.aten.linear.default) == found.count(ops.bitdelta.delta_linear.default) == 2
    assert found.count(ops.aten.embedding.default) == found.count(ops.bitdelta.delta_embedding.default) == 1
    assert all(isinstance(target, torch._ops.OpOverload) for target in found)
    buffers = set(program.graph_signature.inputs_to_buffers.values())
    assert {"bitdelta.table.weight.signs", "bitdelta.middle.weight.left", "bitdelta.norm.bias.dense"} <= buffers
    assert program.state_dict["bitdelta.table.weight.signs"].shape == (1, 1, V, 3)


def test_the_base_is_shared_and_not_copied(base: nn.Module, merged: ExportedProgram) -> None:
    for name, parameter in base.named_parameters():
        assert merged.state_dict[name].data_ptr() == parameter.data_ptr()


def test_the_deltas_come_back_out(deltas: Mapping[str, Delta], singles: Mapping[str, ExportedProgram]) -> None:
    for name, delta in deltas.items():
        found = programs.delta_of(singles[name])
        assert found.tied == delta.tied == {"head.weight": "table.weight"}
        for parameter, encoding in found.encodings.items():
            if parameter.startswith("unused"):  # no node reads its delta
                continue
            assert encoding.layout == delta.encodings[parameter].layout
            pairs = zip(encoding.tensors().values(), delta.encodings[parameter].tensors().values(), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("tenants", [["a", None, "c", "b", "b"], ["c"], [None, None]])
def test_many_tenants(
    tenants: list[str | None], base: nn.Module, deltas: Mapping[str, Delta], merged: ExportedProgram
) -> None:
    assert About.of(merged).tenants == ("a", "b", "c")
    check_rows(merged.module(), base, deltas, tenants, "abc")


def test_tenants_exported_at_once(base: nn.Module, deltas: Mapping[str, Delta]) -> None:
    program = exported(base, deltas, slots=5)
    assert About.of(program).tenants == ("a", "b", "c", None, None)
    assert program.state_dict["bitdelta.table.weight.signs"].shape[0] == 5
    check_rows(program.module(), base, deltas, ["b", None, "a"], "abc")


def test_a_vocabulary_that_grew(base: nn.Module, deltas: Mapping[str, Delta]) -> None:
    torch.manual_seed(1)
    larger = Model(V + 3).eval()
    with torch.no_grad():
        for mine, theirs in zip(larger.parameters(), perturbed(base, 9).parameters(), strict=True):
            mine[: theirs.shape[0]] = theirs
    grown = compress(base, larger, method="mean_abs")
    program = exported(base, {"grown": grown, "a": deltas["a"]})
    args, kwargs = inputs(3)
    args[0][0, 0] = V + 2
    found = program.module()(*args, **kwargs, tenant=torch.tensor([0, 1, -1], dtype=torch.int32))["logits"]
    dense = Model(V + 3).eval()
    dense.load_state_dict(dict(grown.materialize(base)), strict=False)
    torch.testing.assert_close(found[0], dense(*args, **kwargs)["logits"][0], rtol=1e-4, atol=1e-4)
    alone = args[0][1:], {"mask": kwargs["mask"][1:]}
    torch.testing.assert_close(found[2, :, :V], base(alone[0], **alone[1])["logits"][1], rtol=1e-4, atol=1e-4)
    assert found[1:, :, V:].eq(-torch.inf).all()


@pytest.mark.parametrize("which", ["single", "merged"])
def test_saved_and_loaded(
    which: str,
    base: nn.Module,
    deltas: Mapping[str, Delta],
    singles: Mapping[str, ExportedProgram],
    merged: ExportedProgram,
    tmp_path: Path,
) -> None:
    program = merged if which == "merged" else singles["a"]
    save_program(program, tmp_path / "x.pt2")
    for loaded in (load_program(tmp_path / "x.pt2"), torch.export.load(tmp_path / "x.pt2")):
        assert About.of(loaded) is not None
        assert About.of(loaded).fingerprint.digest == About.of(program).fingerprint.digest
        args, kwargs = inputs(4)
        if which == "merged":
            kwargs["tenant"] = torch.tensor([0, -1, 2, 1], dtype=torch.int32)
        for key, value in program.module()(*args, **kwargs).items():
            assert torch.equal(loaded.module()(*args, **kwargs)[key], value)


def test_programs_from_disk_share_one_base(
    base: nn.Module, deltas: Mapping[str, Delta], singles: Mapping[str, ExportedProgram], tmp_path: Path
) -> None:
    whole, less = tmp_path / "whole.pt2", tmp_path / "less.pt2"
    weights = sum(parameter.nbytes for parameter in base.parameters())
    save_program(singles["a"], whole)
    save_program(singles["a"], less, base="org/base")
    assert less.stat().st_size < whole.stat().st_size - 0.9 * weights
    bare = torch.export.load(less)
    assert programs.is_weightless(bare)
    assert About.of(bare).base == "org/base"
    loaded = load_program(less, base=base)
    assert loaded.state_dict["middle.weight"].data_ptr() == base.get_parameter("middle.weight").data_ptr()
    for program in (merge({"a": loaded, "b": singles["b"]}), merge({"a": bare, "b": bare}, base=base)):
        check_rows(program.module(), base, deltas, ["a", None], "ab")
    check_rows(merge({"a": bare, "b": singles["b"]}).module(), base, deltas, ["b", "a"], "ab")


def test_a_weightless_program_without_its_base(
    base: nn.Module, singles: Mapping[str, ExportedProgram], tmp_path: Path
) -> None:
    file = tmp_path / "x.pt2"
    save_program(singles["a"], file, base=tmp_path / "nowhere")
    with pytest.raises(BitDeltaError, match="nowhere"):
        load_program(file)
    with pytest.raises(BaseMismatchError, match="is not the base"):
        load_program(file, base=perturbed(base, 3))
    args, kwargs = inputs(3)
    with pytest.raises(RuntimeError, match="meta"):  # never numbers
        torch.export.load(file).module()(*args, **kwargs)


def test_a_failed_save_leaves_the_old_file(
    singles: Mapping[str, ExportedProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.pt2"
    file.write_text("precious")

    def fail(program: object, path: Path) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(BitDeltaError, match="No space left"):
        save_program(singles["a"], file)
    assert file.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_are_no_programs(tmp_path: Path, base: nn.Module) -> None:
    args, kwargs = inputs(3)
    torch.export.save(torch.export.export(base, args, kwargs), tmp_path / "plain.pt2")
    with pytest.raises(UnsupportedError, match=r"bdc\.export did not make it"):
        load_program(tmp_path / "plain.pt2")
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(BitDeltaError, match=r"not a \.pt2 archive"):
        load_program(tmp_path / "text.pt2")
    with pytest.raises(BitDeltaError, match="cannot be read"):
        load_program(tmp_path / "missing.pt2")


def test_programs_that_do_not_agree(
    base: nn.Module, deltas: Mapping[str, Delta], singles: Mapping[str, ExportedProgram]
) -> None:
    other = copy.deepcopy(base)
    other.get_buffer("scale").fill_(3.0)
    batch = Dim("batch", min=1, max=32)
    shapes = {"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    for program, expected in (
        (exported(base, deltas["b"], dynamic_shapes=shapes), "ranges over"),
        (exported(base, deltas["b"], dynamic_shapes=None), "ids"),
        (exported(other, deltas["b"]), "the buffer scale has other values"),
    ):
        with pytest.raises(UnsupportedError, match=rf"programs a and b do not have the same graph: .*{expected}"):
            merge({"a": singles["a"], "b": program})


def test_programs_of_different_bases(base: nn.Module, singles: Mapping[str, ExportedProgram]) -> None:
    stranger = perturbed(base, 5)
    theirs = exported(stranger, compress(stranger, perturbed(stranger, 6), method="mean_abs"))
    with pytest.raises(BaseMismatchError, match="a and b were exported from different bases"):
        merge({"a": singles["a"], "b": theirs})
    changed = copy.deepcopy(base)
    with torch.no_grad():  # one element that no fingerprint looks at
        changed.get_parameter("middle.weight")[0, 1] += 1
    sneaky = exported(changed, programs.delta_of(singles["b"]))
    with pytest.raises(BaseMismatchError, match=r"middle\.weight of b"):
        merge({"a": singles["a"], "b": sneaky})


def test_what_cannot_be_merged(base: nn.Module, deltas: Mapping[str, Delta], merged: ExportedProgram) -> None:
    with pytest.raises(UnsupportedError, match="nothing to merge"):
        merge({})
    with pytest.raises(UnsupportedError, match="has a row index, for a, b, c"):
        merge({"x": merged})
    with pytest.raises(UnsupportedError, match="batch of exactly 3 rows"):
        merge({"a": exported(base, deltas["a"], dynamic_shapes=None)})
    with pytest.raises(UnsupportedError, match="2 slots"):
        exported(base, deltas, slots=2)


def test_what_cannot_be_exported(base: nn.Module, deltas: Mapping[str, Delta]) -> None:
    with pytest.raises(BaseMismatchError):
        exported(perturbed(base, 7), deltas["a"])
    with pytest.raises(BaseMismatchError):
        exported(perturbed(base, 7), deltas)
