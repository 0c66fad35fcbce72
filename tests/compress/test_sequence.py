from __future__ import annotations

import platform
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitdelta_compile.compress.encode import encode
from bitdelta_compile.compress.sequence import collect
from bitdelta_compile.compress.settings import Settings
from bitdelta_compile.compress.streams import Run, Stream, Substitution
from bitdelta_compile.compress.survey import survey
from bitdelta_compile.compress.weights import FittedValues, TunedValues
from bitdelta_compile.encodings import Rows, Sign
from bitdelta_compile.errors import CalibrationError

K = 64


def weights(count=3, step=0.02):
    torch.manual_seed(0)
    base = {f"w{n}": torch.randn(K, K) / 8 for n in range(count)}
    return base, {name: value + step * torch.randn(K, K) / 8 for name, value in base.items()}


def chain(tuned, order, seed):
    """A run that multiplies by the named weights in turn."""

    def call():
        x = torch.randn(40, K, generator=torch.Generator().manual_seed(seed))
        for name in order:
            x = F.linear(x, tuned[name]).tanh()
        return x

    return call


def test_a_stream_stands_before_each_use():
    _, tuned = weights()
    stream = Stream(Run(chain(tuned, ["w0", "w1", "w1"], 0)), tuned, TunedValues(tuned), lambda use: True)
    before = threading.active_count()
    met = []
    while True:
        stream.advance()
        if stream.use is None:
            break
        met.append(stream.use.name)
    assert met == ["w0", "w1", "w1"]
    stream.end()
    assert threading.active_count() <= before


def test_a_stream_that_is_ended_leaves_no_thread():
    _, tuned = weights()
    stream = Stream(Run(chain(tuned, ["w0", "w1"], 0)), tuned, TunedValues(tuned), lambda use: True)
    before = threading.active_count()
    stream.advance()
    assert threading.active_count() == before + 1
    stream.end()
    assert threading.active_count() == before
    assert stream.use is None


def test_errors_of_the_model_reach_the_caller_and_leave_no_thread():
    base, tuned = weights()

    def fails():
        chain(tuned, ["w0", "w1"], 0)()
        raise CalibrationError("no such batch")

    before = threading.active_count()
    runs = [Run(chain(tuned, ["w0", "w1", "w2"], 0)), Run(fails)]
    with pytest.raises(CalibrationError, match="no such batch"):
        encode(base, tuned, runs, Settings(method="sequential"))
    assert threading.active_count() == before


def test_matrices_are_fitted_in_the_order_of_execution_and_the_model_is_untouched():
    base, tuned = weights()
    before = {name: value.clone() for name, value in tuned.items()}
    order = []

    class Watch(dict):
        def __getitem__(self, name):
            order.append(name)
            return super().__getitem__(name)

    runs = [Run(chain(tuned, ["w2", "w0", "w1"], seed)) for seed in range(3)]
    encode(Watch(base), tuned, runs, Settings(method="sequential", min_elements=1))
    assert list(dict.fromkeys(order[-3:])) or order
    assert all(torch.equal(tuned[name], before[name]) for name in tuned)


@pytest.mark.parametrize("method", ["closed_form", "sequential"])
def test_runs_that_go_different_ways(method):
    """As the experts of a mixture: a batch may pass some by, and meet the others in another order."""
    base, tuned = weights(4)
    ways = [["w0", "w1", "w3"], ["w0", "w2", "w3"], ["w1", "w0"]]
    runs = [Run(chain(tuned, ["w0", "w1", "w2", "w3"], 9)), *(Run(chain(tuned, way, n)) for n, way in enumerate(ways))]
    encodings, report = encode(base, tuned, runs, Settings(method=method))
    assert {encoding.kind for encoding in encodings.values()} == {"sign"}
    assert all(figures["error"] < 0.8 for figures in report.values())


def test_the_result_is_the_same_each_time():
    base, tuned = weights()
    runs = [Run(chain(tuned, ["w0", "w1", "w2"], seed)) for seed in range(4)]
    one, other = (encode(base, tuned, runs, Settings(method="sequential", planes=2, rank=2))[0] for _ in range(2))
    for name, encoding in one.items():
        for field, value in encoding.tensors().items():
            assert torch.equal(value, other[name].tensors()[field])


def test_masked_tokens_do_not_count():
    base, tuned = weights(1)
    x = torch.randn(2, 30, K, generator=torch.Generator().manual_seed(1))
    junk = x.clone()
    junk[1, 20:] = 1e3
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 20:] = False

    def found(value, mask):
        run = Run(lambda: F.linear(value, tuned["w0"]), mask)
        return encode(base, tuned, [run], Settings(method="sequential"))[0]["w0"]

    clean, masked, spoilt = found(x, mask), found(junk, mask), found(junk, None)
    assert torch.equal(clean.signs, masked.signs)
    assert not torch.equal(clean.signs, spoilt.signs)


def test_a_matrix_that_later_turns_out_to_be_used_otherwise_is_dense():
    base, tuned = weights(2)
    runs = [Run(chain(tuned, ["w0", "w1"], 0)), Run(lambda: (tuned["w1"] * 2, chain(tuned, ["w0"], 1)()))]
    encodings, report = encode(base, tuned, runs, Settings(method="sequential"))
    assert (encodings["w0"].kind, encodings["w1"].kind) == ("sign", "dense")
    assert "used by" in report["w1"]["why"]


def test_values_of_a_grown_table_are_looked_up_row_by_row():
    torch.manual_seed(0)
    base, tuned = torch.randn(20, K), torch.randn(23, K)
    sign = Sign((20, K), torch.float32, torch.randint(-9, 9, (1, 20, 2), dtype=torch.int32), torch.rand(1, 20))
    grown = Rows((23, K), torch.float32, torch.arange(20, 23), tuned[20:], sign)
    values = FittedValues({"t": base}, {"t": tuned})
    values.encodings = {"t": grown}
    ids = torch.tensor([[3, 22, 3], [0, 19, 20]])
    assert torch.allclose(values.rows("t", ids), grown.apply(base)[ids])
    assert torch.allclose(values.matrix("t"), grown.apply(base))


def test_questions_about_narrow_parameters_are_answered_in_fp32():
    layer = nn.Linear(K, K, dtype=torch.bfloat16)
    named = dict(layer.named_parameters())
    with torch.no_grad(), Substitution(named, lambda use: None, TunedValues(named)):
        assert layer.weight.dtype == torch.float32
        assert layer(torch.randn(2, K)).dtype == torch.float32
        assert layer.weight.shape == (K, K)
    assert layer.weight.dtype == torch.bfloat16


def biased(changed=True):
    """Base and tuned weights and biases of two layers, and a run of them on inputs that are far from centred."""
    base, tuned = weights(2, step=0.3)
    for name in ("b0", "b1"):
        base[name] = torch.randn(K)
        tuned[name] = base[name] + (0.1 * torch.randn(K) if changed else 0)

    def outputs(of):
        x = 2 + torch.randn(200, K, generator=torch.Generator().manual_seed(3))
        return F.linear(F.linear(x, of["w0"], of["b0"]).tanh(), of["w1"], of["b1"])

    return base, tuned, outputs


@pytest.mark.parametrize("method", ["sequential", "closed_form"])
def test_stored_biases_make_up_for_the_mean(method):
    base, tuned, outputs = biased()
    found, _ = encode(base, tuned, lambda: outputs(tuned), Settings(method))
    assert found["b1"].kind == "dense"
    kept = {name: encoding.apply(base[name]) for name, encoding in found.items()}
    without = {**kept, "b0": tuned["b0"], "b1": tuned["b1"]}
    wanted = outputs(tuned).mean(0)
    lost, lost_without = ((outputs(each).mean(0) - wanted).norm() for each in (kept, without))
    assert lost < 0.2 * lost_without
    if method == "sequential":
        assert lost < 1e-4 * wanted.norm()


def test_biases_that_are_the_bases_stay_so():
    base, tuned, outputs = biased(changed=False)
    found, _ = encode(base, tuned, lambda: outputs(tuned), Settings("sequential"))
    assert found["b0"].kind == found["b1"].kind == "same"


def test_a_bias_with_another_use_is_left_alone():
    base, tuned, outputs = biased()
    found, _ = encode(base, tuned, lambda: outputs(tuned) * tuned["b1"], Settings("sequential"))
    assert torch.equal(found["b1"].value, tuned["b1"])
    assert not torch.equal(found["b0"].value, tuned["b0"])


def test_looking_over_a_run_holds_one_converted_matrix_at_a_time():
    class Watched(TunedValues):
        def matrix(self, name):
            found = super().matrix(name)
            held.append(len(self._wide))
            return found

    held = []
    _, tuned = weights(3)
    tuned = {name: value.bfloat16() for name, value in tuned.items()}
    run = Run(chain(tuned, ["w0", "w1", "w2", "w0"], 0))
    seen = survey([run], tuned, set(tuned), Watched(tuned))
    found = collect([run], tuned, Watched(tuned), {"w0": K}, seen)
    assert found["w0"].tokens == 80
    assert held
    assert max(held) == 1


LETTING_GO = """
import torch
import torch.nn.functional as F
from bitdelta_compile.compress.streams import Run, Stream, return_memory
from bitdelta_compile.compress.weights import TunedValues

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) * 1024

mega = 1 << 20
bytearray(31 * mega)  # from here on glibc takes smaller pieces from heaps, of which it keeps twice as much
weight = {"w": torch.ones(4, 4)}

def call():
    pieces = [torch.ones(mega // 4) for _ in range(40)]
    del pieces
    F.linear(torch.ones(2, 4), weight["w"])

streams = [Stream(Run(call), weight, TunedValues(weight), lambda use: True) for _ in range(2)]
for stream in streams:
    stream.advance()  # stands in its thread, before the product
kept = anonymous()
return_memory()
print((kept - anonymous()) // mega)
for stream in streams:
    stream.end()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep less")
def test_what_streams_let_go_goes_back_to_the_system():
    run = subprocess.run([sys.executable, "-c", LETTING_GO], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 40  # of 80
