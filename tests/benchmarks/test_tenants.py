"""The benchmarks of many tenants, as far as they can be wrong without a model: what they count, pad and let pass."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def benchmarks() -> Any:
    names = ("fleet", "resident", "tenants_memory", "generation")
    return SimpleNamespace(**{name: importlib.import_module(f"measured.{name}") for name in names})


SMAPS = """\
7f00-7f10 rw-p 00000000 00:00 0
Rss:                 100 kB
Anonymous:           100 kB
7f10-7f20 rw-p 00000000 08:01 5  /models/a b/model.safetensors
Rss:                  80 kB
Anonymous:            30 kB
7f20-7f30 r-xp 00000000 08:01 6  /usr/lib/libtorch_cpu.so
Rss:                  50 kB
Anonymous:             0 kB
7f30-7f40 rw-p 00000000 00:00 0                          [heap]
Rss:                   8 kB
Anonymous:             8 kB
"""


def test_pages_by_what_they_belong_to(benchmarks: Any) -> None:
    found = benchmarks.resident.parse(SMAPS.splitlines())
    assert found == benchmarks.resident.Resident(anonymous=138 << 10, weights=50 << 10, code=50 << 10)


def stages(**megabytes: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    kinds = ("anonymous", "weights", "code")
    return {name: dict(zip(kinds, (v * 10**6 for v in values), strict=True)) for name, values in megabytes.items()}


def test_the_base_counts_once_and_its_graph_not_at_all(benchmarks: Any) -> None:
    attached = stages(
        before=(300, 0, 100),
        loaded=(300, 90, 101),
        compiled=(320, 90, 105),
        tenants=(340, 90, 105),
        serving=(350, 90, 106),
    )
    separate = stages(
        before=(300, 0, 100), loaded=(390, 0, 101), compiled=(410, 0, 105), tenants=(590, 0, 105), serving=(590, 0, 105)
    )
    found = benchmarks.tenants_memory.figures(100.0, attached, separate)
    assert found["resident_mb"] == 110
    assert found["excess"] == pytest.approx(0.10)
    assert (found["base_graph_mb"], found["graph_mb"], found["serving_mb"]) == (20, 10, 120)
    assert found["separate_mb"] == 270
    assert benchmarks.tenants_memory.figures(100.0, attached, None)["separate_mb"] is None


def test_rows_of_another_tenant_are_wrong(benchmarks: Any) -> None:
    before = torch.full((3, 2, 4), 5.0)
    expected = torch.tensor([5.0, 6.0, 6.03])[:, None, None].expand(3, 2, 4)
    assert benchmarks.fleet.check_rows(expected + 1e-5, expected, before, "rows") < 1e-4
    with pytest.raises(AssertionError, match=r"row 1 is off by 0\.03"):
        benchmarks.fleet.check_rows(expected[[0, 2, 2]], expected, before, "rows")


def test_a_row_of_the_base_is_told_by_its_own_size(benchmarks: Any) -> None:
    base = torch.ones(1, 2, 4)
    assert benchmarks.fleet.check_rows(base, base, base, "rows") == 0
    with pytest.raises(AssertionError, match="row 0"):
        benchmarks.fleet.check_rows(1.01 * base, base, base, "rows")


def test_prompts_are_padded_on_the_left(benchmarks: Any) -> None:
    found = benchmarks.generation.padded([torch.tensor([5, 6, 7]), torch.tensor([8])], 4)
    assert found["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]


class Dense:
    """The same logits for any context."""

    def __init__(self, *logits: float) -> None:
        self.logits = torch.tensor(logits)
        self.contexts: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor) -> Any:
        self.contexts.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.logits.expand(1, input_ids.shape[1], -1))


def test_tokens_may_differ_at_a_tie_only(benchmarks: Any) -> None:
    same, prompt = benchmarks.generation.same_up_to_ties, torch.tensor([1, 2])
    dense = Dense(0.0, 1.0, 1.0001, 0.9)
    assert same(dense, prompt, [3, 2, 0], [3, 2])
    assert not same(dense, prompt, [3, 1, 3], [3, 2, 1])
    assert dense.contexts == [[1, 2, 3]]
    with pytest.raises(AssertionError, match="token 1 is 3 instead of 2"):
        same(dense, prompt, [3, 3], [3, 2])
    with pytest.raises(AssertionError, match="1 tokens were generated instead of 2"):
        same(dense, prompt, [3], [3, 2])
