"""Many tenants of a tiny llama on the device: outputs, generate, tenants that come and go without a new graph."""

from __future__ import annotations

import pytest
import torch
from bitdelta_compile.kernels import layout
from bitdelta_compile.lowering.torch_internals import compiled_so_far
from transformers import AutoModelForCausalLM

import bitdelta_compile as bdc


@pytest.fixture(scope="module")
def models(llama_pair):
    base = AutoModelForCausalLM.from_pretrained(llama_pair.base, dtype=torch.float32).eval().cuda()
    delta = bdc.compress(str(llama_pair.base), str(llama_pair.tuned))
    tuned = AutoModelForCausalLM.from_pretrained(llama_pair.base, dtype=torch.float32).eval()
    tuned.load_state_dict(delta.materialize(tuned), strict=False)
    return base, delta, tuned.cuda()


def test_rows_of_the_base_and_of_a_tenant(models):
    base, delta, tuned = models
    model = bdc.attach(base, {"tuned": delta}, slots=4)
    assert {
        stack.sign_layout for stack in model._bank.stacks.values() if stack is not None and stack.signs is not None
    } == {layout.FRAGMENTS}
    ids = torch.randint(64, (2, 9), device="cuda")
    with torch.no_grad():
        found = model(input_ids=ids, tenants=["tuned", None]).logits
        expected = torch.cat([tuned(input_ids=ids[:1]).logits, base(input_ids=ids[1:]).logits])
    assert (found - expected).norm() < 1e-3 * (expected - base(input_ids=ids).logits).norm() + 1e-4 * expected.norm()
    graphs = model._graphs.graphs
    model.add("again", delta)
    model.remove("tuned")
    with torch.no_grad():
        again = model(input_ids=ids, tenants=["again", None]).logits
    torch.testing.assert_close(again, found)
    assert model._graphs.graphs == graphs


def test_tenants_come_and_go_under_cuda_graphs(models):
    """After the warm-up: no graph, no compilation, no record more, and the rows are the new tenants'."""
    base, delta, _ = models
    model = bdc.attach(base, {"tuned": delta}, slots=4, options={"triton.cudagraphs": True})
    ids = torch.randint(64, (2, 9), device="cuda")

    def logits(*tenants):
        torch.compiler.cudagraph_mark_step_begin()
        return model(input_ids=ids, tenants=tenants).logits.clone()

    for _ in range(4):
        expected = logits("tuned", None)
    compiled = compiled_so_far()
    assert min(compiled) > 0
    for _ in range(3):
        model.add("again", delta)
        assert torch.equal(logits("again", None), expected)
        model.replace("again", delta)
        assert torch.equal(logits("again", None), expected)
        model.remove("again")
        assert torch.equal(logits("tuned", None), expected)
    assert compiled_so_far() == compiled


def test_generate(models):
    base, delta, _ = models
    model = bdc.attach(base, {"tuned": delta})
    ids = torch.randint(3, 64, (2, 5), device="cuda")
    found = model.generate(input_ids=ids, tenants=["tuned", None], max_new_tokens=8, do_sample=False)
    assert found.shape == (2, 13)
    assert torch.equal(found[1], base.generate(input_ids=ids[1:], max_new_tokens=8, do_sample=False)[0])


def test_one_fine_tune_under_cuda_graphs(models):
    base, delta, tuned = models
    compiled = torch.compile(base, backend="bitdelta", options={"delta": delta, "mode": "reduce-overhead"})
    ids = torch.randint(64, (2, 9), device="cuda")
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(input_ids=ids).logits.clone()
        expected = tuned(input_ids=ids).logits
    assert (found - expected).norm() < 1e-3 * expected.norm()
