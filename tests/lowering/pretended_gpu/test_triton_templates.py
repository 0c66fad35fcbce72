"""Triton templates without a GPU: what Inductor generates is right, interpreted and as the PTX of sm_90."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitdelta_compile.kernels import layout
from bitdelta_compile.lowering import inductor, ops
from bitdelta_compile.lowering.device_source import device_source
from torch.nn.functional import linear

pytest.importorskip("triton")
without_gpu = pytest.importorskip("without_gpu")
problems = pytest.importorskip("problems")

HERE = Path(__file__).parent
FRAGMENTS = layout.FRAGMENTS
PROBLEMS, generate = problems.PROBLEMS, problems.generate
KERNEL = {
    "exact": "= exact_delta(",
    "prompts": "= exact_delta(",
    "any rows": "= exact_delta(",
    "fused": "= base_delta_part(",
    "fused groups": "= base_delta_part(",
    "fused any batch": "= base_delta_part(",
    "tuned": "= base_delta_part(",
    "tuned prompts": "= with_base(",
}


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
    code, inputs = generate(PROBLEMS[name])
    check(PROBLEMS[name], [without_gpu.run(code, each, 90) for each in inputs])


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "apart"])
def test_a_cuda_graph_of_it_is_right(name, monkeypatch):
    """Nothing is left outside of the graph, and launches made once are right for whatever lies in its inputs later."""
    problem = PROBLEMS[name]
    monkeypatch.setattr(problem, "options", {**problem.options, "triton.cudagraphs": True})
    code, (inputs, *_) = generate(problem)
    assert code.count("def partition_") == 1
    outside = code[code.index("class Runner") : code.index("runner = Runner")]
    assert outside.count("self.partitions[0](") == 1
    assert not re.search(r"\.run\(|extern_kernels|torch\.ops|copy_|empty_strided", outside)
    inputs, launches = [tensor.clone() for tensor in inputs], []
    (found,) = without_gpu.run(code, inputs, 90, launches)
    arguments = inputs[-len(problem.inputs(problem.calls[0])) :]
    for tensor in arguments[: len(problem.calls[0])]:
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else tensor.roll(1))
    assert len(launches) > 1
    for launch in launches:
        launch()
    expected = problem.expected(*arguments)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < problem.tolerance, float(error)


def check(problem, results):
    for call, (found,) in zip(problem.calls, results, strict=True):
        expected = problem.expected(*problem.inputs(call))
        assert found.dtype == problem.dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert error < problem.tolerance, float(error)


@pytest.mark.parametrize("name", PROBLEMS)
def test_generated_code_compiles_and_holds_all_it_needs(name):
    code, _ = generate(PROBLEMS[name])
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
    (_, first, *_), signs = problems.bank(2, 1, 32, 1024)
    (_, second, *_), more = problems.bank(2, 1, 48, 1024)
    x, tenant = torch.randn(2, 1024).bfloat16(), problems.index(0, 1)
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


def test_autotuning_times_prompts_with_rows_in_every_slot(monkeypatch):
    """Zeros, which Inductor would take for integers, would be segments without rows."""
    made = {}

    def keep(self, name, nodes, layout, values, key, choices, *args, **kwargs):
        for place, make in values.items():
            on_host = SimpleNamespace(get_size=nodes[place].get_size, get_device=lambda: torch.device("cpu"))
            made[place] = make(on_host).tolist()
        return dict.fromkeys(choices, 1.0)

    monkeypatch.setattr(problems, "timed", lambda fastest: keep)
    generate(PROBLEMS["tuned prompts"])
    assert list(made.values()) == [[0, 1, 2, 3], [0, 2, 4, 4]]


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
