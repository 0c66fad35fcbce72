"""Every GPU kernel with every entry of the tuning table, compiled ahead of time: no spills, few instructions."""

from __future__ import annotations

import importlib
import re

import pytest

pytest.importorskip("triton")

ledger = importlib.import_module("measured.ledger")

ENTRIES = [(entry, target) for entry in ledger.entries() for target in entry.targets]
HOT_LOOP = {  # thread-instructions per weight on sm_90
    "binary": 0.06,
    "binary 24 bit": 0.075,
    "fused": 0.06,
    "exact": 0.85,
    "exact 3 parts": 0.85,
    "exact ragged": 0.9,
    "exact with base": 0.85,
    "exact ragged one plane": 0.9,
    "prefill": 1.0,  # for 32 or 64 rows at once
    "prefill 3 parts": 1.0,
    "prefill ragged": 1.2,  # of several planes
    "prefill ragged one plane": 1.0,
    "prefill with base": 1.25,  # two loops, between which the registers are shared
}
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KiB that a program can have


@pytest.mark.parametrize(("entry", "target"), ENTRIES, ids=[f"{entry.name}-{target}" for entry, target in ENTRIES])
def test_every_entry_compiles_and_keeps_its_limits(entry, target):
    compiled = ledger.compile_for(entry, target)
    record = ledger.count(entry, target, compiled)
    assert record["spills"] == 0
    assert record["shared"] <= SHARED[target] << 10
    kind = re.sub(r" [A-Z]+\d+", "", entry.name)  # without the entry of the table
    if target == 90 and kind in HOT_LOOP:
        assert record["per_weight"] <= HOT_LOOP[kind]
    if target == "gfx942" and entry.kernel == "exact_kernel":
        assert "v_mfma" in compiled.asm["amdgcn"]
    if target == 90 and entry.config in ledger.configs.PREFILL_SM90:
        assert record["loop"]["HGMMA"] == 32  # two tiles of outputs, 16 features at a time
    if entry.module == "columns" and isinstance(target, int):  # a lane keeps to itself
        assert record["shared"] == 0
        assert "shfl" not in compiled.asm["ptx"]
    if isinstance(target, int) and entry.config is not None:
        fragments_are_loaded_as_they_are_multiplied(entry, compiled, record)


def fragments_are_loaded_as_they_are_multiplied(entry, compiled, record):
    """Signs go from memory to the matrix instructions without passing through another lane or shared memory."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(.*)$", text, re.MULTILINE))
    if entry.kernel == "exact_kernel":
        assert record["under_way"] > 0  # of the next step, while this one is multiplied
        assert not re.search(r"local_(alloc|store).*tensor<\d+x\d+xi16", text)
        weights = re.findall(r"(#ttg\.dot_op<\{opIdx = 0, parent = #\w+)", text)
        assert weights
        assert "SHFL" not in record["loop"]
        return
    used = set(re.findall(r"elementwise_inline_asm \"mma\.sync.*?(#\w+)>", text))
    assert used
    for name in used:
        assert "sizePerThread = [1, 1, 1, 4], threadsPerWarp = [1, 1, 1, 32]" in layouts[name]
        assert f"warpsPerCTA = [{entry.warps}, 1, 1, 1]" in layouts[name]
    assert not {"SHFL", "LDS", "STS", "BAR", "LDSM"} & set(record["loop"])
