"""The demo's parts and its checks on tiny models and stand-ins; `make demo` runs the whole on real ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitdelta_compile.lowering.torch_internals import Compiled
from PIL import Image
from torch import Tensor

from bitdelta_compile import attach, compress, demo
from bitdelta_compile.delta import Delta
from bitdelta_compile.demo import package as demo_package
from bitdelta_compile.demo import rows as demo_rows
from bitdelta_compile.demo import tenants as demo_tenants
from bitdelta_compile.demo.rows import DemoFailedError, Row
from bitdelta_compile.fidelity import Fidelity


def tenant(*, paper: float = 0.98, ours: float = 0.999, error: float = 1e-5) -> demo.TenantResult:
    scores = [Fidelity("encoder", 0.9, after, 8, "texts") for after in (paper, ours)]
    return demo.TenantResult("sre", *scores, 90_000_000, 3_600_000, error, 1.5, 20.0)


def test_the_plot_is_a_picture_with_something_on_it(tmp_path: Path) -> None:
    tenants = [tenant(), dataclasses.replace(tenant(), name="rohan")]
    with Image.open(demo.plot(tenants, tmp_path / "plot.png")) as picture:
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 50


@pytest.mark.parametrize("wrong", [{"error": 1e-2}, {"error": float("nan")}, {"ours": 0.97}, {"paper": 0.9}])
def test_a_fine_tune_that_came_out_wrong_is_not_shown(wrong: dict[str, float]) -> None:
    tenant().check()
    with pytest.raises(DemoFailedError, match="sre"):
        tenant(**wrong).check()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"own": 2e-3}, "off its dense model"),
        ({"own": float("nan")}, "off its dense model"),
        ({"others": {"base": 1.0, "rohan": 0.01}}, "what rohan gives"),
        ({"published": 1.5}, "own fine-tune"),
    ],
)
def test_a_row_that_is_not_its_tenants_is_not_shown(wrong: dict[str, Any], expected: str) -> None:
    row = Row("sre", "a text", own=1e-6, published=0.1, others={"base": 1.0, "rohan": 1.1})
    row.check()
    with pytest.raises(DemoFailedError, match=expected):
        dataclasses.replace(row, **wrong).check()


@dataclasses.dataclass(frozen=True)
class Material:
    base: Path
    tuned: dict[str, Path]
    files: dict[str, Path]


@pytest.fixture(scope="module")
def material(bert_pair, tmp_path_factory: pytest.TempPathFactory) -> Material:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("demo")
    other = transformers.AutoModel.from_pretrained(bert_pair.base)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.005 * torch.randn_like(parameter).sign()
    other.save_pretrained(folder / "other")
    for path in bert_pair.base.glob("token*"):
        (folder / "other" / path.name).write_bytes(path.read_bytes())
    tuned = {"sre": bert_pair.tuned, "rohan": folder / "other"}
    files = {name: folder / f"{name}.bitdelta.safetensors" for name in tuned}
    for name, file in files.items():
        compress(bert_pair.base, tuned[name], tokens=256).save(file)
    return Material(bert_pair.base, tuned, files)


def test_the_second_half_without_inductor(material: Material, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    package = tmp_path / "tenants.pt2"
    found = demo_tenants.run(
        material.base, material.tuned, material.files, package, quick=True, progress=lambda *step: steps.append(step)
    )
    assert [row.tenant for row in found.rows] == ["sre", "base", "rohan", "sre", "base", "rohan"]
    assert [sorted(row.others) for row in found.rows[:3]] == [["base", "rohan"], ["rohan", "sre"], ["base", "sre"]]
    assert all(row.own < 1e-4 for row in found.rows)
    assert [row.published is None for row in found.rows[:3]] == [False, True, False]
    changes = found.changes
    assert changes.compiled == (0, 0, 0)
    assert min(changes.calls, changes.replaced) >= demo_tenants.QUICK_ROUNDS
    assert changes.added == changes.removed == changes.replaced + 1
    assert changes.rows == 6 * changes.calls
    assert found.packaged is None
    assert not package.exists()
    assert (steps[0][1], steps[-1][1]) == (0, steps[-1][2])


def test_deltas_under_the_wrong_names_are_not_shown(material: Material, tmp_path: Path) -> None:
    swapped = {"sre": material.files["rohan"], "rohan": material.files["sre"]}
    with pytest.raises(DemoFailedError, match="own fine-tune"):
        demo_tenants.run(material.base, material.tuned, swapped, tmp_path / "tenants.pt2", quick=True)


@pytest.fixture(scope="module")
def packaged(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of `demo_package.run`."""
    torch._dynamo.reset()
    base = transformers.AutoModel.from_pretrained(material.base).eval()
    base.config.return_dict = False
    deltas = {name: Delta.load(file) for name, file in material.files.items()}
    tenants = ["sre", None, "rohan"]
    ids = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    scale = demo_rows.Scale(material.base, material.tuned, deltas, batch)
    found = demo_rows.hidden(attach(base, deltas, lower="eager"), batch, tenants=tenants)
    file = tmp_path_factory.mktemp("package") / "tenants.pt2"
    seconds = demo_package.make(base, deltas, file)
    return {"file": file, "seconds": seconds, "deltas": deltas, "tenants": tenants, "found": found, "scale": scale}


def test_the_package_runs_without_this_package(packaged: dict[str, Any]) -> None:
    found = demo_package.run(**packaged)
    assert found.batches == (3, 2, 1)
    assert max(found.error, found.replaced_error) < 1e-4
    assert found.nbytes == packaged["file"].stat().st_size
    assert (found.export_seconds, found.package_seconds) == packaged["seconds"]


def test_a_package_with_other_numbers_is_not_shown(packaged: dict[str, Any]) -> None:
    wrong = packaged["found"].clone()
    wrong[2] += 0.01 * wrong[2].std()
    with pytest.raises(DemoFailedError, match="without this package is"):
        demo_package.run(**packaged | {"found": wrong})


def test_a_package_that_needs_this_package_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DemoFailedError, match="does not run without this package"):
        demo_package.run_in_fresh_process(tmp_path / "missing.pt2", [])
    loads = "model = torch._inductor.aoti_load_package(package)"
    assert loads in demo_package._FRESH_PROCESS
    script = demo_package._FRESH_PROCESS.replace(loads, "import bitdelta_compile.lowering")
    monkeypatch.setattr(demo_package, "_FRESH_PROCESS", script)
    with pytest.raises(DemoFailedError, match="bitdelta_compile"):
        demo_package.run_in_fresh_process(tmp_path / "missing.pt2", [])


class StandIn:
    """Answers like an attached model, each tenant with a number of its own; `fault` breaks one thing."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.numbers = {"sre": 1.0, "rohan": 2.0, None: 0.0}
        self.compiled = 1

    def __call__(self, input_ids: Tensor, tenants: Sequence[str | None]) -> tuple[Tensor]:
        rows = torch.tensor([self.numbers[name] for name in tenants])
        if self.fault == "rows mix" and len(set(tenants)) > 1:
            rows = rows + 1e-6 * rows.sum()
        return (input_ids * rows[:, None, None],)

    def add(self, name: str, file: Path) -> None:
        self.numbers[name] = self.numbers["sre" if self.fault == "wrong guest" else file.stem]
        self.compiled += self.fault == "compiles"

    def replace(self, name: str, file: Path) -> None:
        if self.fault == "not replaced":
            return
        self.numbers[name] = 1.5 if self.fault == "half replaced" else self.numbers[file.stem]

    def remove(self, name: str) -> None:
        del self.numbers[name]


def change(model: StandIn, monkeypatch: pytest.MonkeyPatch) -> demo_tenants.Changes:
    monkeypatch.setattr(demo_tenants, "compiled_so_far", lambda: Compiled(*[model.compiled] * 3))
    batch, tenants = {"input_ids": torch.ones(3, 4, 2)}, ["sre", None, "rohan"]
    stand_in: Any = model
    found = demo_rows.hidden(stand_in, batch, tenants=tenants)
    files = {"sre": Path("sre"), "rohan": Path("rohan")}
    return demo_tenants.change_while_running(stand_in, batch, tenants, found, files, rounds=5, compiled=True)


def test_changes_while_running_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StandIn()
    changes = change(model, monkeypatch)
    assert set(model.numbers) == {"sre", "rohan", None}
    assert changes.compiled == (0, 0, 0)
    assert changes.added == changes.removed == changes.replaced + 1 >= 6


@pytest.mark.parametrize("fault", ["rows mix", "wrong guest", "half replaced", "not replaced", "compiles"])
def test_changes_that_disturb_calls_are_not_shown(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "graphs" if fault == "compiles" else "not bit for bit"
    with pytest.raises(DemoFailedError, match=expected):
        change(StandIn(fault), monkeypatch)


def test_counters_that_count_nothing_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StandIn()
    model.compiled = 0
    with pytest.raises(DemoFailedError, match="does not count"):
        change(model, monkeypatch)
