"""The GPU benchmarks as far as they can be wrong without a GPU: what they count, derive and draw; the timed model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bitdelta_compile.kernels import reference


@pytest.fixture(scope="module")
def benchmarks() -> Any:
    """The folder as a package under another name: it is not installed, and the repository must not be on `sys.path`."""
    package = ModuleType("measured_gpu")
    package.__path__ = [str(Path(__file__).parents[2] / "benchmarks")]
    sys.modules["measured_gpu"] = package
    names = (
        "gpu_agree",
        "gpu_ceilings",
        "gpu_decode",
        "gpu_fit",
        "gpu_generate",
        "gpu_prefill",
        "gpu_timing",
        "gpu_ways",
        "registry",
        "timing",
    )
    return SimpleNamespace(**{name: importlib.import_module(f"measured_gpu.{name}") for name in names})


def test_without_a_device_every_case_says_so(benchmarks: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    run = benchmarks.registry.Run(tmp_path, True, tmp_path)
    cases = [case for name, case in benchmarks.registry.CASES.items() if name.startswith("gpu-")]
    assert len(cases) == 6
    for case in cases:
        with pytest.raises(benchmarks.registry.SkippedError, match="CUDA"):
            list(case.measure(run))


def test_ways_take_turns_and_the_clock_is_asked(benchmarks: Any) -> None:
    met: list[str] = []
    seconds = iter([9.0, 9.0, 3.0, 10.0, 1.0, 30.0, 2.0, 20.0])
    ways = {"a": lambda: met.append("a"), "b": lambda: met.append("b")}

    def clock(way: Any) -> float:
        way()
        return next(seconds)

    found = benchmarks.timing.side_by_side(ways, repeats=3, warmup=1, clock=clock)
    assert found == {"a": 2.0, "b": 20.0}
    assert met == ["a", "b"] * 4


def test_cycled_data_is_more_than_twice_the_cache(benchmarks: Any) -> None:
    for nbytes in (1 << 20, 33 << 20, 50 << 20, 1 << 30):
        copies = benchmarks.gpu_timing.cold_copies(nbytes, 50 << 20)
        assert (copies - 1) * nbytes >= 2 * (50 << 20)  # the others, between two visits of one


def test_settings_are_dropped_when_the_time_is_up(benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 5.0, 11.0])
    assert list(benchmarks.gpu_timing.within("abcd", 10.0, lambda: next(clock))) == ["a", "b"]
    assert "2 of 4 settings left out" in capsys.readouterr().out


SECONDS = {"base": 10e-6, "delta": 6e-6, "delta, eager": 5e-6, "base + delta": 12e-6, "original": 200e-6, "bmm": 150e-6}
SECONDS |= {f"lora {rank}": 7e-6 for rank in (16, 64, 128)}


def test_figures_of_decoding(benchmarks: Any, tmp_path: Path) -> None:
    shape = benchmarks.gpu_ways.Shape("q, o", 4096, 4096, 16, 1)
    found = benchmarks.gpu_decode.figures(shape, {**SECONDS, "separate": 160e-6}, 4e12)
    packed, base = 16 * 4096 * 4096 / 8, 2 * 4096 * 4096
    assert found["packed_gb_s"] == pytest.approx(packed / 5e-6 / 1e9)
    assert found["packed_of_hbm"] == pytest.approx(packed / 5e-6 / 4e12)
    assert found["both_of_hbm"] == pytest.approx((packed + base) / 12e-6 / 4e12)
    assert found["speedup"] == pytest.approx(160 / 12)
    assert found["ratio"] == pytest.approx(1.2)
    assert found["one_launch_us"] is None
    apart = benchmarks.gpu_decode.figures(shape, {**SECONDS, "one launch": 11e-6, "apart": 13e-6}, 4e12)
    assert (apart["one_launch_us"], apart["apart_us"]) == pytest.approx((11.0, 13.0))
    without = benchmarks.gpu_decode.figures(shape, SECONDS, 4e12)
    assert without["speedup"] is None
    benchmarks.gpu_decode.plot([found, {**without, "tenants": 64}], tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 1000


def test_figures_of_prompts_and_of_the_step(benchmarks: Any, tmp_path: Path) -> None:
    shape = benchmarks.gpu_ways.Shape("q, o", 4096, 4096, 4, 1024)
    seconds = {**SECONDS, "separate": 44e-6}
    found = benchmarks.gpu_prefill.figures(shape, seconds, 700e12)
    assert found["rows"] == 4096
    assert found["delta_of_gemm"] == pytest.approx(2 * 4096**3 / 5e-6 / 700e12)
    benchmarks.gpu_prefill.plot([found], tmp_path / "prefill.png")
    step = benchmarks.gpu_generate.figures(16, {"base": 5e-3, "tenants": 8e-3, "one": 4e-3})
    assert step["speedup"] == pytest.approx(8.0)
    assert step["separate_tokens_s"] == pytest.approx(250.0)
    assert step["tenants_tokens_s"] == pytest.approx(2000.0)
    benchmarks.gpu_generate.plot([step], tmp_path / "step.png")


def test_the_settings_that_the_claims_are_about_come_first(benchmarks: Any) -> None:
    decode = benchmarks.gpu_decode.shapes(False)
    assert len(decode) == len(set(decode)) > 40
    assert {(each.outputs, each.features) for each in decode[:4]} == {(4096, 4096), (14336, 4096)}
    assert {each.tenants for each in decode[:4]} == {1, 16}
    first = benchmarks.gpu_prefill.shapes(False)[0]
    assert (first.tenants, first.tenants * first.rows) == (4, 4096)


def test_the_step_is_the_dense_models_step(benchmarks: Any) -> None:
    """Each row of the timed decoder against a decoder of its tenant's dense weights."""
    generate = benchmarks.gpu_generate
    config = generate.Config(hidden=64, inner=96, heads=4, kv_heads=2, layers=2, vocabulary=50, context=8)
    where = torch.device("cpu")
    model = generate.Model.random(config, 2, where)

    def dense(weight: torch.Tensor, packed: Any, slot: int) -> torch.Tensor:
        whole = reference.delta_weight(packed[0], packed[1], None, None, None, weight.shape[1])
        return (weight.float() + whole[slot]).bfloat16()

    alone = []
    tenants = torch.tensor([1, 0], dtype=torch.int32)
    found = generate.step(model, generate.State.random(config, 2, tenants, where), True, generate.uncompiled)()
    for row, slot in enumerate(tenants.tolist()):
        own = generate.Model(
            config,
            [
                {name: dense(weight, packed[name], slot) for name, weight in weights.items()}
                for weights, packed in zip(model.layers, model.deltas, strict=True)
            ],
            model.deltas,
            dense(model.table, model.table_delta, slot),
            dense(model.head, model.head_delta, slot),
            model.table_delta,
            model.head_delta,
            model.layout,
        )
        alone.append(generate.step(own, generate.State.random(config, 2, None, where), False, generate.uncompiled)())
        assert (found[row] - alone[-1][row]).float().norm() < 0.03 * found[row].float().norm()
    assert (alone[0][0] - alone[1][0]).float().norm() > 0.1 * alone[0][0].float().norm()


def test_the_fit_is_measured_only_where_it_is_right(benchmarks: Any, tmp_path: Path) -> None:
    gpu_fit = benchmarks.gpu_fit
    records = list(gpu_fit.measure_shape(48, 40, torch.device("cpu"), 1))
    assert [record["step"] for record in records] == ["error feedback", "flips", "fit of `best`"]
    assert all(record["ns_per_weight"] == pytest.approx(record["seconds"] / 48 / 40 * 1e9) for record in records)
    gpu_fit.plot(records, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 1000
    problem = gpu_fit.Problem.random(48, 40, torch.device("cpu"))
    expected = problem.feed()
    assert problem.cost(problem.flip(expected)) < problem.cost(expected)
    gpu_fit.check(problem, "feed", expected, expected)
    with pytest.raises(benchmarks.registry.WrongResultError, match="of the signs"):
        gpu_fit.check(problem, "feed", -expected, expected)


def test_the_kernels_of_the_fit_are_left_out_for_comparison(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    signs = benchmarks.gpu_fit.signs

    def kernels(place: Any) -> Any:
        raise AssertionError("asked for")

    monkeypatch.setattr(signs.device, "column_kernels", kernels)
    problem = benchmarks.gpu_fit.Problem.random(8, 8, torch.device("cpu"))
    assert benchmarks.gpu_fit.in_pytorch(problem.feed)().shape == (1, 8, 8)
    with pytest.raises(AssertionError, match="asked for"):
        problem.feed()
