"""The ops on signs in the layout of the GPU kernels, where none of them can run; which kernel a GPU would get."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from bitdelta_compile.kernels import configs, layout
from bitdelta_compile.lowering import device, ops


def bank(slots, outputs, features):
    signs = layout.pack(torch.rand(slots, 2, outputs, features, generator=torch.Generator().manual_seed(0)) < 0.5)
    scales = torch.rand(slots, 2, outputs), torch.rand(slots, 2, features)
    return signs, *scales, torch.randn(slots, outputs, 3).bfloat16(), torch.randn(slots, 3, features).bfloat16()


def test_without_a_gpu_both_layouts_give_the_same_and_one_line_says_so(caplog):
    signs, *rest = bank(3, 20, 300)
    made = layout.to_layout(signs, 300, layout.FRAGMENTS)
    tenant = torch.tensor([2, -1, 0], dtype=torch.int32)
    x, ids = torch.randn(3, 5, 300), torch.randint(0, 20, (3, 5))
    device._log_fallback.cache_clear()
    for _ in range(2):
        found = ops.delta_linear(x, made, *rest, tenant, layout=layout.FRAGMENTS)
        assert torch.equal(found, ops.delta_linear(x, signs, *rest, tenant))
        options = {"embedding_dim": 300, "dtype": torch.float32}
        looked_up = ops.delta_embedding(ids, made, *rest, tenant, **options, layout=layout.FRAGMENTS)
        assert torch.equal(looked_up, ops.delta_embedding(ids, signs, *rest, tenant, **options))
    assert len([record for record in caplog.records if "plain PyTorch" in record.message]) == 1


def test_shapes_and_gradients_in_the_layout_of_the_kernels():
    signs, *rest = bank(2, 20, 40)
    made = layout.to_layout(signs, 40, layout.FRAGMENTS)
    tenant = torch.tensor([1, -1], dtype=torch.int32)
    x = torch.randn(2, 40, requires_grad=True)
    torch.library.opcheck(ops.delta_linear, (x, made, *rest, tenant), {"layout": layout.FRAGMENTS})
    options = {"embedding_dim": 40, "dtype": torch.float32, "layout": layout.FRAGMENTS}
    torch.library.opcheck(ops.delta_embedding, (torch.tensor([3, 19]), made, *rest, tenant), options)


def test_the_package_works_where_triton_cannot_be_imported():
    source = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from bitdelta_compile.kernels import layout\nfrom bitdelta_compile.lowering import device, ops\n"
        "signs = layout.to_layout(torch.zeros(1, 1, 4, 2, dtype=torch.int32), 40, layout.FRAGMENTS)\n"
        "print(ops.delta_linear(torch.ones(1, 40), signs, torch.ones(1, 1, 4), None, None, None, None,"
        " layout=layout.FRAGMENTS)[0, 0].item(), device._kernels('delta_linear'))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-40.0", "None"]
    assert done.stderr.count("\n") <= 1


FACTS = {"outputs": 4096, "features": 4096, "dtype": torch.bfloat16, "column": False}


@pytest.mark.parametrize(
    ("arch", "rows", "slots", "change", "expected"),
    [
        (90, 16, 16, {}, configs.Plan(configs.BINARY_DECODE[0])),
        (90, 1, 1, {}, configs.Plan(configs.BINARY_DECODE[1])),
        (80, 32, 4, {}, configs.Plan(configs.BINARY_DECODE[2])),
        (90, 16, 16, {"column": True}, configs.Plan(configs.BINARY_DECODE[0], wide=True)),
        (90, 16, 16, {"dtype": torch.float32}, configs.Plan(configs.BINARY_DECODE[0], wide=True)),
        (90, 16, 16, {"exact": True}, configs.Plan(configs.EXACT_DECODE[0])),
        (90, 16, 16, {"exact": True, "column": True}, configs.Plan(configs.EXACT_DECODE[0].of_parts(3), splits=3)),
        (100, 16, 16, {"dtype": torch.float16}, configs.Plan(configs.EXACT_DECODE[0].of_parts(2), splits=2)),
        (90, 16, 4, {"exact": True, "column": True}, configs.Plan(configs.PREFILL_SM90[1].of_parts(3), splits=3)),
        (90, 16, 1, {"exact": True}, configs.Plan(configs.PREFILL_SM90[1])),
        (120, 16, 16, {}, configs.Plan(configs.EXACT_DECODE_SM120[0])),
        ("gfx942", 16, 16, {}, configs.Plan(configs.EXACT_DECODE_AMD[0], form="plain")),
        (90, 16, 16, {"features": 40000}, configs.Plan(configs.EXACT_DECODE[0])),
        (80, 4096, 4, {}, configs.Plan(configs.PREFILL[0], sorted=True)),
        (89, 4096, 65, {}, configs.Plan(configs.PREFILL[1], sorted=True)),
        (90, 4096, 4, {}, configs.Plan(configs.PREFILL_SM90[0], sorted=True)),
        (
            90,
            4096,
            4,
            {"dtype": torch.float32},
            configs.Plan(configs.PREFILL_SM90[0].of_parts(3), splits=3, sorted=True),
        ),
        (90, 4096, 65, {}, configs.Plan(configs.PREFILL_SM90[1], sorted=True)),
        (100, 4096, 4, {}, configs.Plan(configs.PREFILL_SM100[0], sorted=True)),
        (120, 4096, 4, {}, configs.Plan(configs.PREFILL_SMALL[0], sorted=True)),
        ("gfx942", 4096, 4, {}, configs.Plan(configs.PREFILL_SMALL[0], sorted=True, form="plain")),
        (90, 16, 16, {"layout": layout.CANONICAL}, None),
        (90, 16, 16, {"dtype": torch.float64}, None),
        (75, 16, 16, {}, None),
        (None, 16, 16, {}, None),
        (90, 0, 16, {}, None),
    ],
)
def test_static_facts_choose_the_kernel(arch, rows, slots, change, expected):
    facts = FACTS | change
    assert configs.choose(arch, rows, slots, **facts) == expected
    fused = configs.choose_fused(arch, rows, slots, **facts)
    is_binary = expected is not None and isinstance(expected.config, configs.Binary)
    assert (fused is not None) == is_binary


@pytest.mark.parametrize(
    ("arch", "decode", "prefill"),
    [
        (80, configs.EXACT_DECODE, configs.PREFILL),
        (89, configs.EXACT_DECODE, configs.PREFILL),
        (90, configs.EXACT_DECODE, configs.PREFILL_SM90),
        (100, configs.EXACT_DECODE, configs.PREFILL_SM100),
        (120, configs.EXACT_DECODE_SM120, configs.PREFILL_SMALL),
        ("gfx942", configs.EXACT_DECODE_AMD, configs.PREFILL_SMALL),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autotuning_is_offered_what_an_architecture_can_hold(arch, decode, prefill, dtype):
    for rows, slots, table in ((16, 16, decode), (64, 1, prefill), (4096, 4, prefill), (4096, 400, prefill)):
        plan = configs.choose(arch, rows, slots, **(FACTS | {"dtype": dtype}), exact=True)
        assert plan.entries[0] == plan.config
        assert set(plan.entries) == {entry.of_parts(plan.splits) for entry in table}
    if arch in (80, 89, 90):
        for choose, table in ((configs.choose, configs.BINARY_DECODE), (configs.choose_fused, configs.FUSED_DECODE)):
            assert set(choose(arch, 16, 16, **FACTS).entries) == set(table)


ONE_EACH = configs.Unbounded(indexed=True, each=1)
PROMPTS = configs.Unbounded(indexed=True, each=None)
NO_INDEX = configs.Unbounded(indexed=False, each=None)
SORTED = configs.Plan(configs.PREFILL_SM90[1], sorted=True)


@pytest.mark.parametrize(
    ("arch", "rows", "slots", "unbounded", "expected"),
    [
        (90, 16, 16, ONE_EACH, configs.Plan(configs.BINARY_DECODE[0])),
        (90, 16, 4, ONE_EACH, configs.Plan(configs.BINARY_DECODE[0])),  # no row can look for the others of its slot
        (90, 16, 1, NO_INDEX, configs.Plan(configs.BINARY_DECODE[2])),
        (90, 16, 16, PROMPTS, SORTED),
        (90, 16, 16, dataclasses.replace(ONE_EACH, each=configs.MOST_ROWS_EACH + 1), SORTED),
        (120, 16, 16, ONE_EACH, configs.Plan(configs.PREFILL_SMALL[0], sorted=True)),
        (90, 4096, 4, ONE_EACH, configs.Plan(configs.PREFILL_SM90[0], sorted=True)),
    ],
)
def test_static_facts_choose_the_kernel_for_any_number_of_rows(arch, rows, slots, unbounded, expected):
    found = configs.choose(arch, rows, slots, **FACTS, unbounded=unbounded)
    assert found == expected
    assert found.entries[0] == found.config
    assert all(not isinstance(each, configs.Binary) or each.G == 1 or unbounded is NO_INDEX for each in found.entries)


def test_one_launch_is_for_few_rows_of_wide_layers():
    def pays(rows, slots, features=4096, dtype=torch.bfloat16):
        plan = configs.choose_fused(90, rows, slots, **(FACTS | {"features": features, "dtype": dtype}))
        return configs.fused_pays(plan, rows, slots, 4096, features, dtype)

    assert pays(1, 1)
    assert pays(16, 16)
    assert not pays(64, 16)
    assert pays(64, 16, features=14336)
    assert not pays(16, 16, features=384)
    assert not pays(1, 1, dtype=torch.float32)
