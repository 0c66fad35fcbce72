"""Triton templates without a GPU: what Inductor generates is right in the interpreter and compiles for sm_90."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from bitdelta_compile.kernels import configs, layout, reference
from bitdelta_compile.kernels.testing import random_bank
from bitdelta_compile.lowering import inductor, ops
from bitdelta_compile.lowering.device_source import device_source
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch.nn.functional import linear, relu

pytest.importorskip("triton")
without_gpu = pytest.importorskip("without_gpu")

HERE = Path(__file__).parent
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

    dtype, tolerance = torch.float32, 2e-6
    calls = ((torch.randn(6, 384), torch.randn(6, 20), index(2, -1, 2)),)


class Prompts(Binary):
    """Many rows: sorted by slot on the device."""

    canonical, signs = bank(2, 1, 24, 100)
    bias = torch.randn(24)
    calls = ((torch.randn(72, 100).bfloat16(), torch.randn(72, 24).bfloat16(), index(1, 0, -1, 1)),)


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
    """The same where autotuning finds that the fused kernel does, with another entry than the first."""

    fastest = "G=4"


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
}
KERNEL = {
    "prompts": "= exact_delta(",
    "any rows": "= exact_delta(",
    "fused": "= base_delta_part(",
    "fused groups": "= base_delta_part(",
    "fused any batch": "= base_delta_part(",
    "tuned": "= base_delta_part(",
}


def timed(fastest):
    """Stands in for Inductor's timing: the choice that has `fastest` in its description."""

    def do_autotuning(self, name, nodes, layout, generators, key, choices, *args, **kwargs):
        names = [f"{type(choice).__name__} {choice.description}" for choice in choices]
        assert name != "bitdelta_base_delta" or (len(choices) > 2 and any(fastest in each for each in names))
        return {choice: 1.0 + (fastest not in each) for choice, each in zip(choices, names, strict=True)}

    return do_autotuning


def generate(problem, *, interpreted):
    """The generated code, and its inputs for every call."""
    stacked = (problem.signs, *problem.canonical[1:])
    given = [tensor for tensor in stacked if tensor is not None]

    def function(*args):
        left = iter(args[: len(given)])
        own = [None if tensor is None else next(left) for tensor in stacked]

        def delta(x, tenant):
            return ops.delta_linear(x, *own, tenant, layout=FRAGMENTS)

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
        code = without_gpu.generated(
            scope["traced"], (*given, *traced_arguments), inductor.compile_graph, dynamic,
            one_size=problem.one_size, most=problem.most, **problem.options,
        )  # fmt: skip
    return code, [[*given, *problem.inputs(call)] for call in problem.calls]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the generated code of every problem computes, in one process of Triton's interpreter."""
    folder = tmp_path_factory.mktemp("generated")
    for name, problem in PROBLEMS.items():
        code, inputs = generate(problem, interpreted=True)
        (folder / f"{name}.py").write_text(code)
        torch.save(inputs, folder / f"{name}.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "run_generated.py"), str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.out", weights_only=True) for name in PROBLEMS}


@pytest.mark.parametrize("name", PROBLEMS)
def test_generated_code_is_right(name, results):
    check(PROBLEMS[name], results[name])


@pytest.mark.parametrize("name", PROBLEMS)
def test_compiled_code_is_right(name):
    """What runs here is what a GPU would run: its PTX."""
    code, inputs = generate(PROBLEMS[name], interpreted=False)
    check(PROBLEMS[name], [without_gpu.run(code, each, 90) for each in inputs])


def check(problem, results):
    for call, (found,) in zip(problem.calls, results, strict=True):
        expected = problem.expected(*problem.inputs(call))
        assert found.dtype == problem.dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert error < problem.tolerance, float(error)


@pytest.mark.parametrize("name", PROBLEMS)
def test_generated_code_compiles_and_holds_all_it_needs(name):
    code, _ = generate(PROBLEMS[name], interpreted=False)
    statements = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#"))
    assert "torch.ops.bitdelta" not in statements
    assert "bitdelta_compile" not in statements
    kernels = without_gpu.kernels(code)
    ours = [kernel for kernel in kernels.values() if kernel.kind in ("template", "user_autotune")]
    templates = [name for name, kernel in kernels.items() if kernel.kind == "template"]
    assert len(templates) == 1
    assert KERNEL.get(name, "= binary_delta(") in code
    assert ("extern_kernels.mm(" in statements) == (name == "apart")
    assert "relu" in templates[0], "bias, activation and residual are not fused into the op's kernel"
    for kernel in ours:
        made = without_gpu.assemble(kernel)
        if kernel.kind == "template":
            assert re.search(r"mma\.(sync|m64|mma_async)|wgmma", made.asm["ptx"])


def test_linears_that_read_the_same_x_share_what_is_made_of_it():
    (_, first, *_), signs = bank(2, 1, 32, 1024)
    (_, second, *_), more = bank(2, 1, 48, 1024)
    x, tenant = torch.randn(2, 1024).bfloat16(), index(0, 1)
    weight, other = torch.randn(32, 1024).bfloat16(), torch.randn(48, 1024).bfloat16()

    def layer(x, signs, first, more, second, tenant, weight, other):
        one = ops.delta_linear(x, signs, first, None, None, None, tenant, layout=FRAGMENTS)
        two = ops.delta_linear(x, more, second, None, None, None, tenant, layout=FRAGMENTS)
        three = ops.delta_linear(x, more, second, None, None, None, tenant, layout=FRAGMENTS) + linear(x, other)
        four = ops.delta_linear(x, signs, first, None, None, None, tenant, layout=FRAGMENTS) + linear(x, weight)
        five = ops.delta_linear(x + 1, more, second, None, None, None, tenant, layout=FRAGMENTS)
        return one, two, three, four, five

    inputs = (x, signs, first, more, second, tenant, weight, other)
    code = without_gpu.generated(layer, inputs, inductor.compile_graph)
    assert code.count("bits_kernel_0.run(") == 2
    assert len(re.findall(r"triton_tem_fused_\w+\.run\(", code)) == 5
    zeros = re.findall(r"(\w+) = empty_strided_cuda\(\(4096, \)", code)
    assert len(zeros) == 1
    assert len(re.findall(rf"\.run\([^\n]*\b{zeros[0]}\b", code)) == 3, "one fill, two launches that count"


def test_the_way_without_a_fused_kernel_is_timed_whole(monkeypatch):
    from bitdelta_compile.lowering import triton_fused

    called = []

    def timed_once(run, device):
        run()
        return 2.5

    def launch(*tensors, out):
        called.append([tuple(tensor.shape) for tensor in tensors])
        return lambda: called.append("delta")

    def product(x, weight, out):
        called.append((tuple(x.shape), tuple(weight.shape), tuple(out.shape)))

    monkeypatch.setattr(triton_fused.benchmarker, "benchmark", timed_once)
    monkeypatch.setattr(torch, "mm", product)
    apart = triton_fused.BaseThenDelta.__new__(triton_fused.BaseThenDelta)
    apart.delta = SimpleNamespace(bmreq=SimpleNamespace(make_run_fn=launch))
    apart.operands, apart.places = (0, 1), [2, 4]
    tensors = [torch.empty(size) for size in ((2, 30), (20, 30), (4,), (5,), (6,))]
    assert apart.benchmark(*tensors, out=torch.empty(2, 20)) == 2.5
    assert called == [[(4,), (6,)], ((2, 30), (30, 20), (2, 20)), "delta"]


@pytest.mark.parametrize(("vocabulary", "features"), [(50, 100), (33, 384), (16, 256)])
def test_a_word_is_where_the_layout_puts_it(vocabulary, features):
    words = layout.words(features)
    signs = torch.arange(vocabulary * words, dtype=torch.int32).reshape(1, 1, vocabulary, words)
    packed = layout.to_layout(signs, features, FRAGMENTS)[0, 0]
    for row in range(vocabulary):
        for word in range(words):
            tile, place = map(int, inductor.word_at(row, word, features, FRAGMENTS))
            assert packed[tile, place] == row * words + word


def test_the_text_of_device_functions_is_whole():
    text = device_source("binary_delta")
    assert text.index("def binary_product") < text.index("def binary_delta")
    assert "_BINARY_OPERANDS" in text
    assert '"""' not in text
    with pytest.raises(KeyError):
        device_source("no_such_function")


def test_without_triton_the_eager_kernel_runs_and_one_line_says_so():
    script = """
import logging, sys
sys.modules["triton"] = None
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("bitdelta_compile").addHandler(handler)
logging.getLogger("bitdelta_compile").setLevel(logging.INFO)
import torch, bitdelta_compile
from bitdelta_compile.lowering import inductor
from bitdelta_compile.kernels.testing import random_bank
assert not inductor.triton_is_there()
inductor._log_fallback("cuda", torch.bfloat16, "fragments_16x256")
inductor._log_fallback("cuda", torch.bfloat16, "fragments_16x256")
assert len(lines) == 1, lines
"""
    subprocess.run([sys.executable, "-c", script], check=True)
