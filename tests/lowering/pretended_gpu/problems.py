"""Graphs with the op as Inductor sees them, by name, and what is to come out of each."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
import without_gpu
from bitdelta_compile.kernels import configs, layout, reference
from bitdelta_compile.kernels.testing import random_bank
from bitdelta_compile.lowering import inductor, ops
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch.nn.functional import linear, relu

FRAGMENTS = layout.FRAGMENTS


def bank(slots, planes, outputs, features, **extras):
    """The stacked delta in the canonical layout and with its signs in the device's."""
    canonical = random_bank(slots, planes, outputs, features, **extras)
    return canonical, layout.to_layout(canonical[0], features, FRAGMENTS)


def index(*slots):
    return torch.tensor(slots, dtype=torch.int32)


class Binary:
    """Two planes, column scales, low rank; rows of one slot, of the base and of no slot; bias, ReLU, residual."""

    canonical, signs = bank(3, 2, 20, 384, column=True, rank=2)
    bias, dtype, tolerance = torch.randn(20), torch.bfloat16, 1e-2
    dynamic: tuple[int, ...] = ()
    one_size, most = False, None
    options: ClassVar[dict[str, object]] = {}
    fastest: str | None = None
    exact = False
    calls = ((torch.randn(6, 384).bfloat16(), torch.randn(6, 20).bfloat16(), index(2, -1, 0, 2, 7, 2)),)

    def run(self, delta, x, residual, tenant, bias):
        return relu(delta(x, tenant) + bias.to(x.dtype)) + residual

    def inputs(self, call):
        return (*call, self.bias)

    def expected(self, x, residual, tenant, bias):
        y = reference.delta_linear(x, *self.canonical, tenant)
        return relu(y + bias.to(x.dtype)) + residual


class Exact(Binary):
    """The same in fp32, by the exact path; three rows of each entry."""

    dtype, tolerance, exact = torch.float32, 2e-6, True
    calls = ((torch.randn(6, 384), torch.randn(6, 20), index(2, -1, 2)),)


class Prompts(Binary):
    """Many rows: sorted by slot on the device."""

    canonical, signs = bank(2, 1, 24, 700)
    bias = torch.randn(24)
    calls = ((torch.randn(72, 700).bfloat16(), torch.randn(72, 24).bfloat16(), index(1, 0, -1, 1)),)


class AnyRows(Binary):
    """A graph for any number of rows, and for an index of any length: the rows of an entry may be a prompt's."""

    canonical, signs = bank(3, 1, 24, 256)
    bias = torch.randn(24)
    dynamic = (0, 1, 2)
    calls = tuple(
        (torch.randn(rows, 256).bfloat16(), torch.randn(rows, 24).bfloat16(), tenant)
        for rows, tenant in ((4, index(1, 0, -1, 1)), (6, index(2, 1)))
    )


class AnyBatch(AnyRows):
    """One row of each entry, in any number: no kernel looks through all rows for those of a slot."""

    one_size = True
    calls = tuple(
        (torch.randn(rows, 256).bfloat16(), torch.randn(rows, 24).bfloat16(), torch.arange(rows).int() % 5 - 1)
        for rows in (2, 5)
    )


class OneTenant(Binary):
    """No row index, odd sizes, fp16."""

    canonical, signs = bank(1, 1, 33, 200)
    bias, dtype, tolerance = torch.randn(33), torch.float16, 1e-3
    calls = ((torch.randn(5, 200).half(), torch.randn(5, 33).half(), None),)

    def inputs(self, call):
        x, residual, _ = call
        return (x, residual, self.bias)

    def run(self, delta, x, residual, bias):
        return super().run(delta, x, residual, None, bias)

    def expected(self, x, residual, bias):
        return super().expected(x, residual, None, bias)


class AnyRowsOfOneTenant(OneTenant):
    """No row index: groups of rows share the reading of the signs, however many rows there are."""

    dynamic = (0, 1)
    one_size = True
    calls = tuple((torch.randn(rows, 200).half(), torch.randn(rows, 33).half(), None) for rows in (2, 6))


class Fused(Binary):
    """Base and delta in one launch; rows of the base and of no slot."""

    canonical, signs = bank(3, 1, 70, 700)
    weight, bias = torch.randn(70, 700).bfloat16(), torch.randn(70).bfloat16()
    calls = ((torch.randn(4, 1, 700).bfloat16(), torch.randn(4, 1, 70).bfloat16(), index(2, -1, 7, 2)),)

    def inputs(self, call):
        return (*call, self.weight, self.bias)

    def run(self, delta, x, residual, tenant, weight, bias):
        return relu(linear(x, weight, bias) + delta(x, tenant)) + residual

    def expected(self, x, residual, tenant, weight, bias):
        base = linear(x.double(), weight.double(), bias.double())
        return relu(base + reference.delta_linear(x, *self.canonical, tenant)) + residual


class FusedGroups(Fused):
    """All parts of a delta; groups of rows; a number of rows that varies up to a bound."""

    canonical, signs = bank(2, 2, 40, 1000, column=True, rank=2)
    weight, bias = torch.randn(40, 1000).bfloat16(), torch.randn(40).bfloat16()
    dynamic, one_size, most = (0, 1, 2), True, 24
    calls = tuple(
        (torch.randn(rows, 1000).bfloat16(), torch.randn(rows, 40).bfloat16(), torch.arange(rows).int() % 3 - 1)
        for rows in (6, 3)
    )


class FusedAnyBatch(Fused):
    """One row of each entry, in any number: more than one tile of rows."""

    canonical, signs = bank(3, 1, 40, 700)
    weight, bias = torch.randn(40, 700).bfloat16(), torch.randn(40).bfloat16()
    dynamic, one_size = (0, 1, 2), True
    calls = tuple(
        (torch.randn(rows, 700).bfloat16(), torch.randn(rows, 40).bfloat16(), torch.arange(rows).int() % 5 - 1)
        for rows in (4, 17)
    )


class Apart(Fused):
    """The same where autotuning finds that the library and the delta's kernel take less time."""

    options: ClassVar = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN"}
    fastest = "BaseThenDelta"


class Tuned(Apart):
    """The same, with a low-rank part, where autotuning finds that the fused kernel does, with another entry."""

    canonical, signs = bank(3, 1, 70, 700, rank=2)
    fastest = "G=4"


class TunedPrompts(Tuned):
    """Many rows where autotuning finds that the exact kernel should multiply the base too."""

    canonical, signs = bank(2, 1, 24, 700, rank=2)
    weight, bias = torch.randn(24, 700).bfloat16(), torch.randn(24).bfloat16()
    calls = ((torch.randn(72, 700).bfloat16(), torch.randn(72, 24).bfloat16(), index(1, 0, -1, 1)),)
    fastest = "BASE=True"


PROBLEMS = {
    "binary": Binary(),
    "exact": Exact(),
    "prompts": Prompts(),
    "any rows": AnyRows(),
    "any batch": AnyBatch(),
    "one tenant": OneTenant(),
    "any rows of one tenant": AnyRowsOfOneTenant(),
    "fused": Fused(),
    "fused groups": FusedGroups(),
    "fused any batch": FusedAnyBatch(),
    "apart": Apart(),
    "tuned": Tuned(),
    "tuned prompts": TunedPrompts(),
}


def timed(fastest):
    """Stands in for Inductor's timing: the choice that has `fastest` in its description."""

    def do_autotuning(self, name, nodes, layout, generators, key, choices, *args, **kwargs):
        names = [f"{type(choice).__name__} {choice.description}" for choice in choices]
        assert name != "bitdelta_base_delta" or (len(choices) > 2 and any(fastest in each for each in names))
        return {choice: 1.0 + (fastest not in each) for choice, each in zip(choices, names, strict=True)}

    return do_autotuning


def generate(problem, *, interpreted=False, how=without_gpu.generated):
    """The generated code, or what else `how` makes of the problem, and its inputs for every call."""
    stacked = (problem.signs, *problem.canonical[1:])
    given = [tensor for tensor in stacked if tensor is not None]

    def function(*args):
        left = iter(args[: len(given)])
        own = [None if tensor is None else next(left) for tensor in stacked]

        def delta(x, tenant):
            return ops.delta_linear(x, *own, tenant, layout=FRAGMENTS, exact=problem.exact)

        return problem.run(delta, *args[len(given) :])

    traced_arguments = problem.inputs(problem.calls[0])
    names = [f"a{place}" for place in range(len(given) + len(traced_arguments))]
    scope = {"function": function}
    exec(f"def traced({', '.join(names)}):\n    return function({', '.join(names)})", scope)
    dynamic = {len(given) + place: 0 for place in problem.dynamic}
    choose = configs.choose

    def chosen(*args, **kwargs):
        plan = choose(*args, **kwargs)
        return None if plan is None else dataclasses.replace(plan, form="interpreted" if interpreted else plan.form)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "choose", chosen)
        if problem.fastest is not None:
            patch.setattr(AlgorithmSelectorCache, "make_precompile_fn", lambda *args, **kwargs: dict)
            patch.setattr(AlgorithmSelectorCache, "do_autotuning", timed(problem.fastest))
        code = how(
            scope["traced"], (*given, *traced_arguments), inductor.compile_graph, dynamic,
            one_size=problem.one_size, most=problem.most, **problem.options,
        )  # fmt: skip
    return code, [[*given, *problem.inputs(call)] for call in problem.calls]
