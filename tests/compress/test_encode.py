from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from bitdelta_compile.compress import tables
from bitdelta_compile.compress.encode import encode, unrelated
from bitdelta_compile.compress.fit import DeltaMatrix
from bitdelta_compile.compress.metric import Moments
from bitdelta_compile.compress.settings import Allocation, Settings
from bitdelta_compile.compress.streams import Run
from bitdelta_compile.compress.workdir import WorkDir
from bitdelta_compile.encodings import Dense, Rows, Same, Sign
from bitdelta_compile.errors import BitDeltaError, CalibrationError

N, K = 96, 70


def pair(rows=N, features=K, step=0.01):
    base = torch.randn(rows, features)
    return base, base + step * torch.randn(rows, features)


def encode_one(base, tuned, use=None, **settings):
    forward = None if use is None else lambda: use(tuned)
    encodings, report = encode({"w": base}, {"w": tuned}, forward, Settings(**settings))
    return encodings["w"], report.get("w", {})


def linear(weight):
    torch.manual_seed(7)
    F.linear(torch.randn(64, weight.shape[1]) + 1, weight)


def share_lost(encoding, base, tuned):
    return float((encoding.apply(base) - tuned).norm() / (tuned - base).norm())


def test_equal_is_same():
    base, _ = pair()
    assert isinstance(encode_one(base, base.clone())[0], Same)


def test_the_base_rounded_to_the_tuned_dtype_is_same():
    base, _ = pair()
    encoding, _ = encode_one(base, base.bfloat16())
    assert isinstance(encoding, Same)
    assert encoding.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(5000,), (), (0,), (0, 7), (7, 0), (4, 4), (3, 40, 50)])
def test_what_is_no_matrix_or_tiny_is_dense(shape):
    base = torch.zeros(shape)
    tuned = base + 1
    encoding, _ = encode_one(base, tuned)
    if tuned.numel() == 0:
        assert isinstance(encoding, Same)
    else:
        assert isinstance(encoding, Dense)
        assert torch.equal(encoding.apply(base), tuned)
        assert encoding.value.data_ptr() != tuned.data_ptr()


def test_a_new_parameter_is_dense():
    tuned = torch.randn(N, K)
    encodings, _ = encode({}, {"w": tuned}, None, Settings())
    assert torch.equal(encodings["w"].value, tuned)


def test_a_matrix_is_sign():
    base, tuned = pair()
    encoding, report = encode_one(base, tuned, linear)
    assert isinstance(encoding, Sign)
    assert (encoding.planes, encoding.rank, encoding.transposed) == (1, 0, False)
    assert encoding.shape == (N, K)
    assert 0.3 < report["error"] < 0.7
    assert 0.5 < share_lost(encoding, base, tuned) < 0.75
    assert report["weight_error"] == pytest.approx(
        share_lost(encoding, base, tuned) * float((tuned - base).norm() / tuned.norm()), rel=1e-3
    )


def test_inputs_decide_the_scales():
    base, tuned = pair()
    seen, _ = encode_one(base, tuned, linear)
    blind, _ = encode_one(base, tuned)
    mean_abs, _ = encode_one(base, tuned, linear, method="mean_abs")
    x = torch.randn(500, K) + 1
    lost = [float((x @ (e.apply(base) - tuned).T).norm()) for e in (seen, blind, mean_abs)]
    assert lost == sorted(lost)
    assert mean_abs.col_scale is None
    torch.testing.assert_close(mean_abs.row_scale, (tuned - base).abs().mean().expand(1, N))


@pytest.mark.parametrize("option", ["planes", "rank"])
def test_more_bits_lose_less(option):
    base, tuned = pair()
    for method in ("closed_form", "mean_abs", "sequential"):
        errors = [
            encode_one(base, tuned, linear, method=method, **{option: count})[1]["error"] for count in (1, 2, 3, 4)
        ]
        assert errors == sorted(set(errors), reverse=True)


def test_rank_zero_is_no_low_rank_part():
    base, tuned = pair()
    assert encode_one(base, tuned, linear)[0].left is None
    assert encode_one(base, tuned, linear, rank=3)[0].rank == 3


def test_transposed_storage():
    base, tuned = pair(K, N)
    encoding, _ = encode_one(base, tuned, lambda w: torch.addmm(torch.zeros(N), torch.randn(8, K), w))
    assert encoding.transposed
    assert encoding.row_scale.shape == (1, N)
    assert share_lost(encoding, base, tuned) < 0.75


def test_far_from_the_base_is_dense():
    encoding, report = encode_one(*pair(step=2.0), linear)
    assert isinstance(encoding, Dense)
    assert "0.25" in report["why"]


def test_planes_that_take_no_fewer_bytes_are_not_used():
    base = torch.randn(4096, 1).bfloat16()
    encoding, report = encode_one(base, base * 1.1)
    assert isinstance(encoding, Dense)
    assert "bytes" in report["why"]


@pytest.mark.parametrize(
    "use",
    [lambda w: w * 2, lambda w: (F.linear(torch.randn(2, N), w.T), w[:5] + 1), lambda w: (linear(w), w.T @ w)],
)
def test_other_uses_are_dense(use):
    encoding, report = encode_one(*pair(), use)
    assert isinstance(encoding, Dense)
    assert "used by" in report["why"]


def test_both_orientations_are_dense():
    encoding, report = encode_one(*pair(), lambda w: (linear(w), F.linear(torch.randn(2, N), w.T)))
    assert isinstance(encoding, Dense)
    assert "transposed" in report["why"]


@pytest.mark.parametrize("transposed", [False, True])
def test_few_changed_rows_are_stored_alone(transposed):
    base, _ = pair()
    tuned = base.clone()
    tuned[[3, 90]] += 1
    if transposed:
        base, tuned = base.T.contiguous(), tuned.T.contiguous()
    use = (lambda w: torch.randn(2, K) @ w) if transposed else linear
    encoding, _ = encode_one(base, tuned, use)
    assert isinstance(encoding, Rows)
    assert encoding.over is None
    assert encoding.index.tolist() == [3, 90]
    assert torch.equal(encoding.apply(base), tuned)


def test_many_changed_rows_are_not():
    base, _ = pair()
    tuned = base.clone()
    tuned[:40] += 0.01 * torch.randn(40, K)
    encoding, _ = encode_one(base, tuned, linear)
    assert isinstance(encoding, Sign)
    assert (encoding.row_scale[0, 40:] == 0).all()
    assert torch.equal(encoding.apply(base)[40:], base[40:])


def lookup(table):
    return F.embedding(torch.tensor([0, 2]), table)


def test_a_grown_table_is_rows_over_sign():
    base, tuned = pair()
    tuned = torch.cat([tuned, torch.randn(5, K)])
    encoding, _ = encode_one(base, tuned, lookup)
    assert isinstance(encoding, Rows)
    assert isinstance(encoding.over, Sign)
    assert (encoding.shape, encoding.over.shape) == ((N + 5, K), (N, K))
    applied = encoding.apply(base)
    assert torch.equal(applied[N:], tuned[N:])
    assert (applied[:N] - tuned[:N]).norm() < 0.75 * (base - tuned[:N]).norm()


def test_a_table_that_only_grew_is_rows():
    base, _ = pair()
    encoding, _ = encode_one(base, torch.cat([base, torch.randn(5, K)]), lookup)
    assert isinstance(encoding, Rows)
    assert encoding.over is None
    assert encoding.index.tolist() == list(range(N, N + 5))


def test_a_table_that_shrank():
    base, tuned = pair()
    encoding, _ = encode_one(base, tuned[:80].clone(), lookup)
    applied = encoding.apply(base)
    assert applied.shape == (80, K)
    assert (applied - tuned[:80]).norm() < 0.75 * (base - tuned)[:80].norm()


def test_other_features_are_dense():
    encoding, report = encode_one(torch.randn(N, K), torch.randn(N, K + 1), linear)
    assert isinstance(encoding, Dense)
    assert f"[{N}, {K}]" in report["why"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("shape", [(N, K), (K,), ()])
def test_values_that_are_not_finite(value, side, shape):
    tensors = {"base": torch.zeros(shape), "tuned": torch.ones(shape)}
    tensors[side].view(-1)[-1] = value
    with pytest.raises(BitDeltaError, match=rf"w: 1 of \d+ values of the {side} parameter"):
        encode_one(tensors["base"], tensors["tuned"])


def test_inputs_that_are_not_finite():
    with pytest.raises(CalibrationError, match="w: the inputs"):
        encode_one(*pair(), lambda w: F.linear(torch.full((2, K), float("nan")), w))


def test_inputs_that_are_zero():
    base, tuned = pair()
    encoding, _ = encode_one(base, tuned, lambda w: F.linear(torch.zeros(2, K), w))
    assert share_lost(encoding, base, tuned) < 0.75


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes(dtypes):
    base, tuned = pair(step=0.05)
    base, tuned = base.to(dtypes[0]), tuned.to(dtypes[1])
    encoding, _ = encode_one(base, tuned, lambda w: F.linear(torch.randn(8, K, dtype=w.dtype), w))
    assert isinstance(encoding, Sign)
    assert encoding.dtype == dtypes[1]
    assert share_lost(encoding, base.float(), tuned.float()) < 0.75


def test_handles_stand_for_the_tuned_tensors():
    base, tuned = pair(K, N)
    handle = torch.empty(K, N, device="meta")
    encodings, _ = encode(
        {"w": base},
        {"w": tuned},
        lambda: torch.empty(2, K, device="meta") @ handle,
        Settings(method="mean_abs"),
        handles={"w": handle},
        copy=False,
    )
    assert encodings["w"].transposed


def test_progress_ends_complete():
    base, tuned = pair()
    calls = []
    encode({"w": base}, {"w": tuned, "b": torch.ones(3)}, None, Settings(), progress=lambda *call: calls.append(call))
    assert calls == [("fit", 0, 1), ("fit", 1, 1)]


@pytest.mark.parametrize("option", [{"planes": 0}, {"planes": 5}, {"rank": -1}, {"method": "magic"}])
def test_settings_out_of_range(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Settings(**option)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "mean_abs"},
        {"method": "sequential"},
        {"planes": 3},
        {"rank": 5},
        {"planes": 2, "rank": 90},
        {"allocation": {"w": Allocation(planes=2, rank=3)}},
    ],
)
def test_the_bytes_of_planes_are_known_beforehand(settings):
    encoding, _ = encode_one(*pair(), linear, **settings)
    assert isinstance(encoding, Sign)
    assert Settings(**settings).sign_bytes(N, K, "w") == encoding.nbytes


def test_a_model_whose_matrices_are_all_dense_for_being_far_is_unrelated():
    big, tiny = (Dense(shape, torch.float32, torch.zeros(shape)) for shape in ((N, K), (4, 4)))
    far = {"a": {"why": "planes leave much", "weight_error": 0.5}, "b": {"why": "used by einsum"}}
    assert unrelated({"a": big, "b": big, "c": tiny}, far, Settings()) == ["a", "b"]
    assert unrelated({"a": big, "b": Same((N, K), torch.float32)}, far, Settings()) == []
    assert unrelated({"b": big, "c": tiny}, far, Settings()) == []
    assert unrelated({"c": tiny, "d": Same((4, 4), torch.float32)}, far, Settings()) == []


def two_layers(first, second):
    def run():
        x = torch.randn(64, K, generator=torch.Generator().manual_seed(3)) + 1
        return F.linear(F.relu(F.linear(x, first)), second)

    return run


def test_the_second_layer_makes_up_for_the_first():
    torch.manual_seed(0)
    base = {"one": torch.randn(N, K), "two": torch.randn(80, N)}
    tuned = {name: value + 0.05 * torch.randn_like(value) for name, value in base.items()}
    run = two_layers(tuned["one"], tuned["two"])
    wanted, lost = run(), []
    for method in ("closed_form", "sequential"):
        encodings, report = encode(base, tuned, run, Settings(method=method))
        assert set(report) == {"one", "two"}
        found = {name: encodings[name].apply(base[name]) for name in base}
        lost.append(float((two_layers(found["one"], found["two"])() - wanted).norm()))
    assert lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_run_in_fp32(dtype):
    base, tuned = pair(step=0.05)
    base, tuned = base.to(dtype), tuned.to(dtype)
    seen = []

    def run():
        x = torch.randn(64, K, generator=torch.Generator().manual_seed(3))
        seen.append(F.linear(x.to(tuned.dtype), tuned.detach(), torch.zeros(N)))

    encode({"w": base}, {"w": tuned}, run, Settings(method="sequential"))
    assert {found.dtype for found in seen} == {torch.float32}


def test_a_matrix_used_twice_is_fitted_to_both_uses():
    base, tuned = pair()
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(64, 9, generator=generator) @ torch.randn(9, K, generator=generator) for _ in range(2)]

    def use(count):
        return lambda w: [F.linear(x, w) for x in inputs[:count]]

    for method in ("closed_form", "sequential"):
        both, first = (encode_one(base, tuned, use(count), method=method)[0] for count in (2, 1))
        lost = [float((inputs[1] @ (e.apply(base) - tuned).T).norm()) for e in (both, first)]
        assert lost[0] < 0.95 * lost[1]


@pytest.mark.parametrize("method", ["closed_form", "sequential"])
def test_a_tied_table_serves_both_uses(method):
    base, tuned = pair()
    ids = torch.arange(0, N, 3)

    def use(w):
        return F.embedding(ids, w), F.linear(torch.randn(64, K, generator=torch.Generator().manual_seed(3)) + 1, w)

    tied, product = encode_one(base, tuned, use, method=method)[0], encode_one(base, tuned, linear, method=method)[0]
    lookup_error = [float((e.apply(base) - tuned).norm()) for e in (tied, product)]
    product_error = [float((use(e.apply(base))[1] - use(tuned)[1]).norm()) for e in (tied, product)]
    if method == "sequential":
        assert lookup_error[0] < lookup_error[1]
    assert product_error[0] < 0.7 * float((use(base)[1] - use(tuned)[1]).norm())


def far_table(rows=640):
    """All rows moved the same way and each its own; most lookups are of rows 3 and 500."""
    base = torch.randn(rows, K)
    tuned = base + 0.25 * torch.randn(K) + 0.12 * torch.randn(rows, K)
    ids = torch.cat([torch.arange(0, rows, 9), torch.tensor([3, 500]).repeat(200)])
    return base, tuned, lambda w: (F.embedding(ids, w), linear(w))


def test_a_table_that_moved_far_gets_a_common_direction_and_its_most_used_rows():
    base, tuned, use = far_table()
    plain, _ = encode_one(base, tuned, use, method="sequential", far=1.0)
    found, figures = encode_one(base, tuned, use, method="sequential")
    assert isinstance(plain, Sign)
    assert plain.rank == 0
    assert isinstance(found, Rows)
    assert isinstance(found.over, Sign)
    assert (found.over.planes, found.over.rank) == (1, 1)
    assert {3, 500} <= set(found.index.tolist())
    assert figures["rows"] == found.index.numel()
    assert found.index.numel() == 640 // 96
    assert torch.equal(found.apply(base)[found.index], tuned[found.index])
    assert share_lost(found.over, base, tuned) < 0.5 * share_lost(plain, base, tuned)


def test_a_far_table_that_grew_keeps_its_new_rows_too():
    base, tuned, use = far_table()
    grown = torch.cat([tuned, torch.randn(5, K)])
    found, figures = encode_one(base, grown, use, method="sequential")
    assert found.index.tolist()[-5:] == list(range(640, 645))
    assert found.index.numel() == figures["rows"] + 5
    assert torch.equal(found.apply(base)[640:], grown[640:])


def test_a_far_table_that_an_allocation_names_gets_what_it_says():
    base, tuned, use = far_table()
    found, _ = encode_one(base, tuned, use, method="sequential", allocation={"w": Allocation()})
    assert isinstance(found, Sign)
    assert found.rank == 0


def test_rows_never_looked_up_are_not_stored():
    base, tuned, _ = far_table()
    found, _ = encode_one(base, tuned, lambda w: F.embedding(torch.tensor([9, 5]), w), method="sequential")
    assert found.index.tolist() == [5, 9]


def test_what_all_logits_share_does_not_count():
    base, tuned, _ = far_table()
    uses = torch.arange(base.shape[0]) % 5
    moments = Moments(K, torch.device("cpu"))
    moments.add(torch.randn(64, K) + 1)
    share = (0.95 * uses / uses.sum() + 0.05 / base.shape[0]).unsqueeze(-1)
    expected = (tuned - base) - ((tuned - base) * share).sum(0)
    energy = float(((expected @ moments.gram) * expected * share).sum()) / 64
    for moved in (tuned, tuned + torch.randn(K)):
        found = tables.balance(DeltaMatrix(base, moved), moments, uses)
        assert found * float(((moved - base).square() * share).sum()) == pytest.approx(energy, rel=1e-3)


def test_a_far_table_is_resumed_as_it_was(tmp_path, monkeypatch):
    base, tuned, use = far_table()
    settings = Settings(method="sequential")

    def run():
        found = encode({"w": base}, {"w": tuned}, lambda: use(tuned), settings, work=WorkDir(tmp_path, {}))[0]["w"]
        monkeypatch.setattr(sys.modules[encode.__module__], "fit", None)  # it is not fitted again
        return found

    first, second = run(), run()
    for one, two in ((first, second), (first.over, second.over)):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, two.tensors()[name])


def test_masked_tokens_are_no_uses_of_a_far_table():
    base, tuned, _ = far_table()
    ids = torch.full((4, 32), 7)
    ids[:, :3] = torch.arange(20, 32).view(4, 3)
    mask = torch.zeros(4, 32, dtype=torch.bool)
    mask[:, :3] = True
    run = Run(lambda: F.linear(F.embedding(ids, tuned), tuned), mask)
    encodings, _ = encode({"w": base}, {"w": tuned}, [run], Settings(method="sequential"))
    assert 7 not in encodings["w"].index.tolist()
    assert set(encodings["w"].index.tolist()) <= set(range(20, 32))


def test_a_small_far_table_lists_no_rows():
    base, tuned, _ = far_table(80)
    found, _ = encode_one(base, tuned, lambda w: F.embedding(torch.arange(9), w), method="sequential")
    assert isinstance(found, Sign)
    assert found.rank == 1


def test_an_allocation_overrules_the_settings():
    base, tuned = (dict(zip("abcd", (pair()[side] for _ in range(4)), strict=True)) for side in (0, 1))
    tuned = {name: base[name] + 0.01 * torch.randn(N, K) for name in base}
    allocation = {"a": Allocation("dense"), "b": Allocation("same"), "c": Allocation(planes=3, rank=2)}

    def run():
        for name in "abcd":
            linear(tuned[name])

    encodings, _ = encode(base, tuned, run, Settings(method="sequential", allocation=allocation))
    assert [encodings[name].kind for name in "abcd"] == ["dense", "same", "sign", "sign"]
    assert torch.equal(encodings["b"].apply(base["b"]), base["b"])
    assert [(encodings[name].planes, encodings[name].rank) for name in "cd"] == [(3, 2), (1, 0)]


@pytest.mark.parametrize("given", [{"encoding": "rows"}, {"planes": 0}, {"rank": -1}])
def test_allocations_out_of_range(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Allocation(**given)
