"""One package of three tenants: in this process, in one that has only torch, and in C++."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
import zipfile
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
from bitdelta_compile.programs import package as packaging
from bitdelta_compile.programs.export import export
from bitdelta_compile.programs.package import package, read_metadata
from bitdelta_compile.programs.packaged import Package, load_package
from bitdelta_compile.programs.program import save_program, with_extra

V, K = 40, 64
RUNNER = Path(__file__).parents[1] / "examples" / "cpp_runner"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, K)
        self.middle = nn.Linear(K, 2 * K)
        self.norm = nn.LayerNorm(2 * K)
        self.last = nn.Linear(2 * K, K)
        self.head = nn.Linear(K, V, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.head(self.last(self.norm(self.middle(self.table(ids)).relu()) * mask.unsqueeze(-1)))
        return out


def delta_of(base: nn.Module, seed: int, **options: Any) -> Delta:
    tuned = copy.deepcopy(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return compress(base, tuned, method="mean_abs", **options)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def deltas(base: nn.Module) -> dict[str, Delta]:
    return {"a": delta_of(base, 1), "b": delta_of(base, 2, planes=2), "c": delta_of(base, 3)}


@pytest.fixture(scope="module")
def program(base: nn.Module, deltas: Mapping[str, Delta]) -> ExportedProgram:
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=1, max=16)
    shapes = {"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    example = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    merged = export(base, example, delta=deltas, dynamic_shapes=shapes, slots=4)
    return with_extra(merged, {"note": "hello"}, base="org/base")


@pytest.fixture(scope="module")
def file(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "tenants.pt2"
    package(program, path)
    return path


def inputs(rows: int, columns: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(V, (rows, columns), generator=generator), torch.rand(rows, columns, generator=generator)


def expected(base: nn.Module, delta: Delta | None, *args: Tensor) -> Tensor:
    model = copy.deepcopy(base)
    model.load_state_dict(dict(delta.materialize(base)) if delta is not None else {}, strict=False)
    with torch.no_grad():
        out: Tensor = model(*args)
    return out


def check(model: Package, base: nn.Module, deltas: Mapping[str, Delta], tenants: Sequence[str | None]) -> None:
    args = inputs(len(tenants))
    found, plain = model(*args, tenants=tenants), expected(base, None, *args)
    for row, name in enumerate(tenants):
        wanted = expected(base, None if name is None else deltas[name], *args)[row]
        gap = (wanted - plain[row]).norm() if name is not None else wanted.norm()
        assert gap > 0.1
        assert (found[row] - wanted).norm() < 1e-4 * gap, (row, name)


@pytest.mark.parametrize("tenants", [["b"], ["a", None, "c", "b", "a", "a", "c"], [None, None], ["c"] * 33])
def test_any_batch_and_any_mix(
    tenants: list[str | None], file: Path, base: nn.Module, deltas: dict[str, Delta]
) -> None:
    check(load_package(file), base, deltas, tenants)


def test_who_shares_the_batch_does_not_matter(file: Path) -> None:
    model = load_package(file)
    args = inputs(5)
    alone = model(*args, tenants=["a", None, None, None, None])
    mixed = model(*args, tenants=["a", "b", "c", None, "b"])
    assert torch.equal(alone[0], mixed[0])
    assert torch.equal(alone[3], mixed[3])
    assert torch.equal(model(*args), model(*args, tenants=[None] * 5))


def test_metadata(file: Path, program: ExportedProgram) -> None:
    found = read_metadata(file)
    assert json.loads(found["bitdelta.tenants"]) == ["a", "b", "c", None]
    assert found["bitdelta.base"] == "org/base"
    assert found["bitdelta.extra.note"] == "hello"
    assert found["bitdelta.torch"] == torch.__version__
    assert len(found["bitdelta.base_digest"]) == 64
    assert set(found["bitdelta.cpu"].split()) == packaging.cpu_features() != set()
    assert found["AOTI_DEVICE_KEY"] == "cpu"
    assert found == load_package(file).metadata


def test_a_process_with_torch_alone(file: Path, base: nn.Module, deltas: dict[str, Delta], tmp_path: Path) -> None:
    """Batch sizes not seen at export, an index out of range, a tenant replaced."""
    args = inputs(6)
    rows = [expected(base, deltas.get(name), *args)[row] for row, name in enumerate(("c", "", "a", "b", "", ""))]
    new = {
        name: model_tensor
        for name, model_tensor in _stacked_with(file, "a", deltas["c"]).items()
        if name.endswith((".signs", ".row_scale", ".small"))
    }
    torch.save(
        {"args": args, "rows": torch.stack(rows), "new": new, "c": expected(base, deltas["c"], *args)}, tmp_path / "x"
    )
    script = f"""
import sys, torch
found = torch.load({str(tmp_path / "x")!r}, weights_only=True)
model = torch._inductor.aoti_load_package({str(file)!r})
index = torch.tensor([2, -1, 0, 1, 3000000, -7], dtype=torch.int32)
rows = model(*found["args"], tenant=index)
torch.testing.assert_close(rows, found["rows"], rtol=1e-4, atol=1e-4)
one = model(*(each[:1] for each in found["args"]), tenant=index[:1])
torch.testing.assert_close(one, found["rows"][:1], rtol=1e-4, atol=1e-4)
model.load_constants(found["new"], check_full_update=False, user_managed=True)
replaced = model(*found["args"], tenant=torch.zeros(6, dtype=torch.int32))
torch.testing.assert_close(replaced, found["c"], rtol=1e-4, atol=1e-4)
assert not [name for name in sys.modules if name.startswith("bitdelta")]
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)


def _stacked_with(file: Path, name: str, delta: Delta) -> dict[str, Tensor]:
    """The stacked tensors of a package with one tenant replaced, by the names of its constants."""
    model = load_package(file)
    model.replace(name, delta)
    return {
        f"bitdelta.{parameter}.{field}": tensor.clone()
        for parameter, stack in model.stacks.items()
        for field, tensor in stack.tensors().items()
    }


def test_tenants_come_and_go(file: Path, base: nn.Module, deltas: dict[str, Delta], tmp_path: Path) -> None:
    model, new = load_package(file), delta_of(base, 4)
    new.save(tmp_path / "new.bitdelta.safetensors")
    before = model(*inputs(4), tenants=["b", "c", None, "b"])
    model.replace("a", tmp_path / "new.bitdelta.safetensors")
    check(model, base, {**deltas, "a": new}, ["a", "b", None, "c"])
    assert torch.equal(model(*inputs(4), tenants=["b", "c", None, "b"]), before)
    model.add("d", deltas["a"])
    assert model.tenants == {"a": 0, "b": 1, "c": 2, "d": 3}
    check(model, base, {**deltas, "a": new, "d": deltas["a"]}, ["d", "a", None, "c"])
    model.remove("b")
    with pytest.raises(UnsupportedError, match="no tenant 'b'"):
        model(*inputs(1), tenants=["b"])
    model.add("e", new)
    check(model, base, {**deltas, "a": new, "e": new}, ["e", "c", "a"])


def test_a_call_sees_all_of_the_old_or_all_of_the_new(file: Path, base: nn.Module, deltas: dict[str, Delta]) -> None:
    model, args, done = load_package(file), inputs(2), threading.Event()
    whole = [model(*args, tenants=["a", "a"]), model(*args, tenants=["c", "c"])]

    def swap() -> None:
        for turn in range(20):
            model.replace("a", deltas["ca"[turn % 2]])
        done.set()

    thread = threading.Thread(target=swap)
    thread.start()
    while not done.is_set():
        found = model(*args, tenants=["a", "a"])
        assert any(torch.equal(found, each) for each in whole)
    thread.join()


def test_a_slot_that_changes_hands_gives_nobody_anothers_rows(
    file: Path, base: nn.Module, deltas: dict[str, Delta], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a call has named its tenant and not run yet, the tenant cannot go and its slot cannot be another's."""
    model, args = load_package(file), inputs(2)
    wanted, row_index, threads = model(*args, tenants=["a", "a"]), model.row_index, []

    def swap() -> None:
        model.remove("a")
        model.add("d", deltas["c"])

    def slow(*given: Any) -> Tensor:
        found = row_index(*given)
        threads.append(threading.Thread(target=swap))
        threads[-1].start()
        threads[-1].join(0.5)
        return found

    monkeypatch.setattr(model, "row_index", slow)
    assert torch.equal(model(*args, tenants=["a", "a"]), wanted)
    threads[0].join()
    assert "d" in model.tenants


def test_two_who_add_do_not_share_a_slot(file: Path, deltas: dict[str, Delta]) -> None:
    model, wrong = load_package(file), []
    model.remove("b")
    free = model.slots - len(model.tenants)

    def add(name: str) -> None:
        try:
            model.add(name, deltas["a"])
        except UnsupportedError as error:
            wrong.append(str(error))

    for turn in range(5):
        threads = [threading.Thread(target=add, args=(f"{turn}.{n}",)) for n in range(free + 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wrong) == turn + 1
        assert len(set(model.tenants.values())) == len(model.tenants) == model.slots
        for name in [name for name in model.tenants if name.startswith(f"{turn}.")]:
            model.remove(name)


def test_refusals_change_nothing(file: Path, base: nn.Module, deltas: dict[str, Delta]) -> None:
    model = load_package(file)
    before = {name: tensor.clone() for stack in model.stacks.values() for name, tensor in stack.tensors().items()}
    stranger = Model().eval()
    for call, error, message in (
        (lambda: model.replace("x", deltas["a"]), UnsupportedError, "no tenant 'x': the package has a, b, c"),
        (lambda: model.add("a", deltas["a"]), UnsupportedError, "a tenant a already"),
        (lambda: model.replace("a", delta_of(stranger, 1)), BaseMismatchError, "another base"),
        (lambda: model.replace("a", delta_of(base, 5, planes=3)), UnsupportedError, r"weight .*planes=3"),
        (lambda: model.replace("a", delta_of(base, 5, rank=1)), UnsupportedError, r"weight .*rank=1"),
        (lambda: model(*inputs(3), tenants=["a"]), UnsupportedError, "1 tenants for 3 rows"),
        (lambda: model(*inputs(1), tenants=["A"]), UnsupportedError, "no tenant 'A'"),
        (lambda: model(inputs(1)[0], tenants=["a"]), UnsupportedError, "the package takes"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert model.tenants == {"a": 0, "b": 1, "c": 2}
    after = {name: tensor for stack in model.stacks.values() for name, tensor in stack.tensors().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_another_cpu_is_refused_before_its_code_is_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = sorted(packaging.cpu_features())[:2]
    monkeypatch.setattr(packaging, "cpu_features", lambda: set(some))
    with pytest.raises(UnsupportedError, match=r"this CPU lacks .*cpp\.march"):
        load_package(file)
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(UnsupportedError, match="this CPU is pdp11"):
        load_package(file)


def test_files_that_are_no_packages(tmp_path: Path) -> None:
    with pytest.raises(BitDeltaError, match="cannot be read"):
        load_package(tmp_path / "missing.pt2")
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(BitDeltaError, match="not a readable package"):
        load_package(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("x/y.wrapper_metadata.json", "{}")
    with pytest.raises(UnsupportedError, match=r"bdc\.package"):
        load_package(tmp_path / "other.pt2")
    with zipfile.ZipFile(tmp_path / "newer.pt2", "w") as archive:
        archive.writestr("x/y.wrapper_metadata.json", '{"bitdelta.format": "99"}')
    with pytest.raises(UnsupportedError, match="format version 99"):
        load_package(tmp_path / "newer.pt2")


def test_what_cannot_be_packaged(program: ExportedProgram, tmp_path: Path) -> None:
    save_program(program, tmp_path / "less.pt2", base="org/base")
    with pytest.raises(UnsupportedError, match="has no weights"):
        package(torch.export.load(tmp_path / "less.pt2"), tmp_path / "x.pt2")
    with pytest.raises(UnsupportedError, match=r"does not end in \.pt2"):
        package(program, tmp_path / "x.so")


def test_the_cpp_runner(file: Path, tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    assert cmake is not None, "cmake is missing: pip install cmake"
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run([cmake, "-S", str(RUNNER), "-B", str(build), prefix], check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(build)], check=True, capture_output=True)
    args = inputs(4)
    paths = [tmp_path / "ids.pt", tmp_path / "mask.pt"]
    for tensor, path in zip(args, paths, strict=True):
        torch.save(tensor, path)

    def run(index: str) -> subprocess.CompletedProcess[str]:
        command = [str(build / "run_package"), str(file), index, *map(str, paths)]
        return subprocess.run(command, capture_output=True, text=True)

    ran = run("1,-1,0,99")
    assert ran.returncode == 0, ran.stderr
    found = torch.tensor([[float(value) for value in line.split()] for line in ran.stdout.splitlines()])
    wanted = load_package(file)(*args, tenants=["b", None, "a", None])
    torch.testing.assert_close(found, wanted.flatten(1), rtol=1e-6, atol=1e-6)
    refused = run("1,-1")
    assert refused.returncode == 2
    assert "one row per entry of the row index" in refused.stderr
