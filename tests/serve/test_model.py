"""The attached model: rows, threads, tenants that come and go while it runs, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from bitdelta_compile.lowering.torch_internals import compiled_so_far
from torch import Tensor, nn

import bitdelta_compile as bdc
from bitdelta_compile.errors import BaseMismatchError, BitDeltaError, UnsupportedError
from bitdelta_compile.serve import model as serving
from bitdelta_compile.serve.bank import Bank
from bitdelta_compile.serve.model import TenantModel

IN, HIDDEN, OUT = 48, 96, 40


class Net(nn.Module):
    """Any module whose inputs lead with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200, IN)
        self.norm = nn.LayerNorm(IN)
        self.up = nn.Linear(IN, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, ids: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.norm(self.table(ids))
        x = self.down(torch.nn.functional.gelu(self.up(x)))
        return {"y": x if scale is None else x * scale.unsqueeze(-1)}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def tuned(base: nn.Module, seed: int) -> Any:
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def deltas(base: nn.Module, names: str) -> dict[str, bdc.Delta]:
    return {name: bdc.compress(base, tuned(base, ord(name)), method="mean_abs") for name in names}


def dense(base: nn.Module, delta: bdc.Delta) -> nn.Module:
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in delta.materialize(base, dtype=torch.float32):
            parameters[name].copy_(value)
    return model


def ids(rows: int, length: int = 5) -> Tensor:
    return torch.randint(200, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def base() -> Net:
    return net()


@pytest.fixture
def model(base: Net) -> TenantModel:
    return bdc.attach(base, deltas(base, "ab"), slots=4, lower="eager")


def check_rows(model: TenantModel, base: nn.Module, known: Mapping[str, bdc.Delta], rows: Sequence[str | None]) -> None:
    """Each row is its own tenant's: off by far less than it is from any other's."""
    x = ids(len(rows))
    found = model(x, tenants=rows)["y"]
    for at, name in enumerate(rows):
        with torch.no_grad():
            plain = base(x[at : at + 1])["y"]
            own = plain if name is None else dense(base, known[name])(x[at : at + 1])["y"]
        error = (found[at : at + 1] - own).norm()
        if name is None:
            assert error <= 1e-5 * own.norm()
        else:
            assert error <= 1e-3 * (own - plain).norm()


def test_each_row_is_its_own_tenants(base: Net) -> None:
    known = deltas(base, "abc")
    model = bdc.attach(base, known, slots=4, lower="eager")
    for rows in (["a", None, "b"], ["c", "c"], ["b"], [None], ["c", "a", "b", None, "a"]):
        check_rows(model, base, known, rows)


def test_one_graph_for_one_row_and_one_for_more(model: TenantModel) -> None:
    for rows in (["a"], ["a", "b"], ["b", None, "a"], ["b"], ["a"] * 7):
        model(ids(len(rows)), tenants=rows)
    assert model._graphs.graphs == 2


def test_tensors_in_keywords_carry_the_batch(model: TenantModel) -> None:
    x, scale = ids(3), torch.rand(3, 5)
    rows = ["a", "b", None]
    torch.testing.assert_close(model(x, scale=scale, tenants=rows)["y"], model(x, tenants=rows)["y"] * scale[..., None])


def test_tenants_come_and_go_while_it_runs(base: Net) -> None:
    """Compiled by Inductor: nothing is captured or compiled again, and no call sees half a tenant."""
    known = deltas(base, "abc")
    model = bdc.attach(base, {"a": known["a"], "b": known["b"]}, slots=4)
    x = ids(4)
    expected = {name: model(x, tenants=[name] * 4)["y"] for name in (None, "a", "b")}
    model.add("new", known["c"])
    expected["c"] = model(x, tenants=["new"] * 4)["y"]
    model.remove("new")
    graphs, compiled = model._graphs.graphs, compiled_so_far()
    assert min(compiled.graphs, compiled.compilations) > 0
    stop, wrong = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            y = model(x, tenants=["b", None, "b", "b"])["y"]
            if not torch.equal(y[[0, 2, 3]], expected["b"][[0, 2, 3]]) or not torch.equal(y[1], expected[None][1]):
                wrong.append("b")
            y = model(x, tenants=["a"] * 4)["y"]
            if not torch.equal(y, expected["a"]) and not torch.equal(y, expected["c"]):
                wrong.append("a")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for turn in range(12):
            model.add("new", known["c"])
            assert torch.equal(model(x, tenants=["new"] * 4)["y"], expected["c"])
            model.remove("new")
            model.replace("a", known["c" if turn % 2 == 0 else "a"])
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert model._graphs.graphs == graphs
    assert compiled_so_far() == compiled


def test_a_graph_for_every_batch_size(base: Net) -> None:
    known = deltas(base, "ab")
    model = bdc.attach(base, known, slots=2, dynamic=False)
    for rows in (["a", None, "b"], ["b", "a", None], ["a", "b"], [None, "b", "a"]):
        check_rows(model, base, known, rows)
    assert model._graphs.graphs == 2


def test_threads_do_not_meet(model: TenantModel) -> None:
    x = ids(6)
    rows: list[list[str | None]] = [["a"] * 6, ["b"] * 6, [None] * 6, ["a", "b"] * 3]
    expected = [model(x, tenants=names)["y"] for names in rows]
    wrong: list[int] = []

    def serve(at: int) -> None:
        wrong.extend(at for _ in range(30) if not torch.equal(model(x, tenants=rows[at])["y"], expected[at]))

    threads = [threading.Thread(target=serve, args=(at,)) for at in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_under_an_outer_compile(model: TenantModel) -> None:
    x = ids(3)

    def outer(x: Tensor) -> Tensor:
        return model(x, tenants=["a", None, "b"])["y"] * 2

    expected = outer(x)
    assert torch.equal(torch.compile(outer, backend="aot_eager")(x), expected)
    whole = torch.compile(lambda x: outer(x) + 1, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="an attached model compiles its own graphs"):
        whole(x)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", "nobody"], r"no tenant 'nobody': the tenants are a, b; None is the base"),
        (["a"], r"1 tenants were given for inputs of 2 rows"),
        (["a", "b", "a"], r"3 tenants were given for inputs of 2 rows"),
        (None, r"say which tenant each row belongs to"),
        ("a", r"say which tenant each row belongs to"),
        ([], r"say which tenant each row belongs to"),
    ],
)
def test_wrong_rows(model: TenantModel, rows: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        model(ids(2), tenants=rows)


def test_rows_that_cannot_be_divided_among_tenants(model: TenantModel) -> None:
    """What `generate` gives to a forward may repeat every row equally often, as beams do."""
    repeated = model._run(model._serving, model.base, (0, -1), (ids(4),), {})["y"]
    assert torch.equal(repeated, model(ids(4), tenants=["a", "a", None, None])["y"])
    with pytest.raises(UnsupportedError, match="inputs of 5 rows cannot be divided among 2 tenants"):
        model._run(model._serving, model.base, (0, -1), (ids(5),), {})


class Positions(Net):
    def forward(self, positions: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.up(self.table(ids) + self.table(positions))


def test_inputs_that_broadcast_over_the_rows() -> None:
    torch.manual_seed(0)
    base = Positions().eval()
    known = deltas(base, "a")
    model, own = bdc.attach(base, known, lower="eager"), dense(base, known["a"])
    positions, x = torch.arange(5).unsqueeze(0), ids(2)
    y = model(positions, x, tenants=["a", None])
    with torch.no_grad():
        torch.testing.assert_close(y[:1], own(positions, x[:1]))
        torch.testing.assert_close(y[1:], base(positions, x[1:]))
    with pytest.raises(UnsupportedError, match="1 tenants were given for inputs of 2 rows"):
        model(positions, x, tenants=["a"])


def test_a_call_without_tensors(model: TenantModel) -> None:
    with pytest.raises(UnsupportedError, match="inputs of 0 rows"):
        model(tenants=["a"])


def test_what_cannot_be_attached(base: Net) -> None:
    known = deltas(base, "ab")
    with pytest.raises(BaseMismatchError, match="not the base this delta was made for"):
        bdc.attach(net(seed=9), known)
    with pytest.raises(UnsupportedError, match="1 slots cannot hold 2 tenants"):
        bdc.attach(base, known, slots=1)
    with pytest.raises(UnsupportedError, match="a tenant's name is a string"):
        bdc.attach(base, {"": known["a"]})
    with pytest.raises(UnsupportedError, match="has tenants attached"):
        bdc.attach(bdc.attach(base, known, lower="eager"), known)
    with pytest.raises(UnsupportedError, match='"inductor" or "eager"'):
        bdc.attach(base, known, lower="fast")
    with pytest.raises(UnsupportedError, match="reserve names nothing, but the base has no such parameter"):
        bdc.attach(base, known, reserve={"nothing": bdc.Reserve()})
    with pytest.raises(BitDeltaError, match="nowhere"):
        bdc.attach(base, {"a": "nowhere.bitdelta.safetensors"})


def test_bases_that_cannot_be_shared(base: Net) -> None:
    with pytest.raises(UnsupportedError, match=r"call base\.eval\(\)"):
        bdc.attach(copy.deepcopy(base).train(), {})
    with pytest.raises(UnsupportedError, match=r"table\.weight of the base has no data"):
        bdc.attach(copy.deepcopy(base).to("meta"), {})
    half = copy.deepcopy(base)
    half.down.to("meta")
    with pytest.raises(UnsupportedError, match=r"down\.weight of the base has no data"):
        bdc.attach(half, {})
    odd = copy.deepcopy(base)
    odd.up.weight = type("Packed", (nn.Parameter,), {})(odd.up.weight.detach())
    with pytest.raises(UnsupportedError, match=r"up\.weight of the base is a Packed"):
        bdc.attach(odd, {})


def test_a_delta_from_its_file(base: Net, tmp_path: Any) -> None:
    known = deltas(base, "a")
    path = tmp_path / "a.bitdelta.safetensors"
    known["a"].save(path)
    check_rows(bdc.attach(base, {"a": path}, lower="eager"), base, known, ["a", None])


@pytest.mark.parametrize(
    "what", [lambda m: m.half(), lambda m: m.to("meta"), lambda m: m.state_dict(), lambda m: m.load_state_dict({}),
             lambda m: m.save_pretrained("x"), lambda m: m.train(), copy.deepcopy, pickle.dumps]
)  # fmt: skip
def test_what_an_attached_model_is_not(model: TenantModel, what: Any) -> None:
    with pytest.raises(UnsupportedError):
        what(model)
    assert model(ids(2), tenants=["a", None])["y"].dtype == torch.float32


def test_grow_makes_room(base: Net) -> None:
    known = deltas(base, "ab")
    wide = bdc.compress(base, tuned(base, 5), method="mean_abs", planes=2, rank=3)
    model = bdc.attach(base, known, slots=2, lower="eager")
    rows = ["a", None, "b"]
    before = model(ids(3), tenants=rows)["y"]
    with pytest.raises(UnsupportedError, match=r"planes=2 \(there is room for 1\), rank=3"):
        model.replace("a", wide)
    with pytest.raises(UnsupportedError, match="all 2 slots are taken"):
        model.add("c", known["a"])
    with pytest.raises(UnsupportedError, match="would take some away"):
        model.grow(slots=1)
    model.grow(slots=3, fit=[wide])
    torch.testing.assert_close(model(ids(3), tenants=rows)["y"], before)
    model.add("wide", wide)
    assert model.tenants == ("a", "b", "wide")
    check_rows(model, base, {**known, "wide": wide}, ["wide", "a", None, "b"])


class Breaks(Net):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.table(ids)
        torch._dynamo.graph_break()
        return self.up(x)


class Fixed(Net):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        assert int(ids.shape[0]) == 3
        return self.up(self.table(ids)).reshape(3, -1)


class SequenceFirst(Net):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.up(self.table(ids).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Breaks, "Breaks cannot be captured whole"),
        (Fixed, "the batch size is fixed to 3 while the model is traced"),
        (SequenceFirst, r"up\.weight \(it differs in a\) is used by linear .* batch in dimension 1, not in front"),
    ],
)
def test_models_that_cannot_be_shared(kind: type[Net], message: str) -> None:
    torch.manual_seed(0)
    base = kind().eval()
    model = bdc.attach(base, deltas(base, "a"), lower="eager")
    with pytest.raises(UnsupportedError, match=message):
        model(ids(3), tenants=["a", None, "a"])


def test_the_base_is_as_it_was(base: Net, model: TenantModel) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model(ids(3), tenants=["a", "b", None])
    model.remove("a")
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_explain_an_attached_model(model: TenantModel) -> None:
    model(ids(3), tenants=["a", "b", None])
    explanation = bdc.explain(model)
    lines = {line.name: line for line in explanation.lines}
    assert lines["up.weight"].actions == ("base linear + packed-delta linear (1 sign plane)",)
    assert lines["up.bias"].actions == ("each row's own tensor",)
    assert "bitdelta.delta_linear" in explanation.graph("up")
    assert "tenant" in explanation.graph("up")


class Summed(nn.Module):
    """Uses a vector in a way that rows cannot have of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.odd = nn.Linear(IN, HIDDEN), nn.Parameter(torch.rand(IN))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x * torch.cumsum(self.odd, 0))
        return out


def test_a_tenant_that_comes_while_a_graph_is_made_is_not_served_as_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = Summed().eval()
    late, first = tuned(base, 1), copy.deepcopy(base)
    with torch.no_grad():
        first.linear.weight += 0.02 * torch.randn_like(first.linear.weight)
    model = bdc.attach(base, {"first": bdc.compress(base, first, method="mean_abs")}, lower="eager")
    delta = bdc.compress(base, late, method="mean_abs")
    rewrite, came = serving.rewrite_for_rows, []

    def rewriting(*args: Any, **options: Any) -> Any:
        found = rewrite(*args, **options)
        if not came:
            came.append(model.add("late", delta))
        return found

    monkeypatch.setattr(serving, "rewrite_for_rows", rewriting)
    with pytest.raises(BitDeltaError, match=r"odd .*late"):
        model(torch.randn(3, IN), tenants=["first", None, "first"])


def test_what_comes_and_goes_while_the_model_grows_has_come_and_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = net()
    known = deltas(base, "ab")
    model = bdc.attach(base, {"a": known["a"]}, lower="eager")
    grown, threads = Bank.grown, []

    def slow(self: Bank, *args: Any) -> Bank:
        found = grown(self, *args)
        threads.append(threading.Thread(target=lambda: (model.add("b", known["b"]), model.remove("a"))))
        threads[-1].start()
        threads[-1].join(0.5)
        return found

    monkeypatch.setattr(Bank, "grown", slow)
    model.grow(slots=20)
    threads[0].join()
    assert (model.slots, model.tenants) == (20, ("b",))


def test_what_an_attached_model_held_is_gone_with_it() -> None:
    base = net()
    model = bdc.attach(base, deltas(base, "a"), lower="eager")
    model(torch.zeros(2, 3, dtype=torch.int64), tenants=["a", None])
    assert "stack" in str(bdc.explain(model))
    stacks = [weakref.ref(stack) for stack in model._bank.stacks.values()]
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not any(stack() for stack in stacks)
