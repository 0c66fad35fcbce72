"""Running cases: what was measured is on disk at once, and the steps of device.sh fit into one call on a device."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_records_are_kept_when_a_case_ends_early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = ModuleType("measured_runs")
    package.__path__ = [str(BENCHMARKS)]
    monkeypatch.setitem(sys.modules, "measured_runs", package)
    main = importlib.import_module("measured_runs.__main__")
    registry = importlib.import_module("measured_runs.registry")

    def two(run: Any) -> Iterator[dict[str, Any]]:
        yield {"value": 1}
        raise TimeoutError

    monkeypatch.setitem(registry.CASES, "two", registry.Case("two", "", two))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "two", "--out", str(tmp_path)])
    with pytest.raises(TimeoutError):
        main.main()
    (line,) = (tmp_path / "two.jsonl").read_text().splitlines()
    assert json.loads(line)["value"] == 1


def test_the_steps_on_a_device_fit_into_one_call() -> None:
    script = BENCHMARKS / "device.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    limits = {name: int(limit) for name, limit in re.findall(r"^step (\w+) (\d+)", text, re.MULTILINE)}
    assert list(limits) == [
        "machine", "install", "tests", "ceilings", "decode", "generate", "fit", "prefill", "agree", "sanitizer"
    ]  # fmt: skip
    (in_all,) = re.findall(r"SECONDS_IN_ALL:-(\d+)", text)
    assert sum(limits.values()) < int(in_all) < 600
