"""The bank: encodings of all kinds side by side, room, replacement and leases; a refusal changes nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from bitdelta_compile.kernels import layout
from torch import Tensor, nn

import bitdelta_compile as bdc
from bitdelta_compile.checkpoint import open_checkpoint
from bitdelta_compile.encodings import Dense, Encoding, Rows, Same, Sign
from bitdelta_compile.errors import BaseMismatchError, BitDeltaError, DeltaFileError, UnsupportedError
from bitdelta_compile.fingerprint import Fingerprint
from bitdelta_compile.serve.bank import Bank, Base
from bitdelta_compile.serve.reserve import Reserve

V, K, N, SLOTS = 90, 48, 96, 4  # tokens, in, out: every matrix has 4096 elements or more


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, K)
        self.norm = nn.LayerNorm(K)
        self.up = nn.Linear(K, N)
        self.down = transformers.pytorch_utils.Conv1D(K, N)
        self.head = nn.Linear(K, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        out: Tensor = self.head(x + self.down(self.up(x).relu()))
        return out


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.normal_(model.down.weight, std=0.1)
    return model


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def sign(
    base: Tensor, seed: int, *, planes: int = 1, rank: int = 0, cols: bool = False, transposed: bool = False
) -> Sign:
    shape = tuple(base.shape)
    rows, features = (shape[1], shape[0]) if transposed else shape
    return Sign(
        shape,
        base.dtype,
        layout.pack(rand(planes, rows, features, seed=seed) > 0),
        rand(planes, rows, seed=seed).abs() * 0.05,
        rand(planes, features, seed=seed).abs() if cols else None,
        (rand(rows, rank, seed=seed) * 0.1).bfloat16() if rank else None,
        rand(rank, features, seed=seed).bfloat16() if rank else None,
        transposed,
    )


def dense(base: Tensor, seed: int) -> Dense:
    return Dense(tuple(base.shape), base.dtype, base.detach() + 0.1 * rand(*base.shape, seed=seed))


def rows(
    base: Tensor, seed: int, index: list[int], count: int = 0, *, over: Sign | None = None, transposed: bool = False
) -> Rows:
    features = base.shape[0] if transposed else base.shape[1]
    outputs = count or base.shape[1 if transposed else 0]
    shape = (features, outputs) if transposed else (outputs, features)
    return Rows(shape, base.dtype, torch.tensor(index), rand(len(index), features, seed=seed), over, transposed)


def delta(base: nn.Module, tied: dict[str, str] | None = None, **encodings: Encoding) -> bdc.Delta:
    named = {name.replace("__", "."): encoding for name, encoding in encodings.items()}
    return bdc.Delta(named, tied or {}, Fingerprint.of(open_checkpoint(base)))


def of_each_kind(net: Net) -> dict[str, bdc.Delta]:
    """Tenants that store the same parameters in different ways."""
    up, down, table, head = net.up.weight, net.down.weight, net.table.weight, net.head.weight
    return {
        "sign": delta(
            net, up__weight=sign(up, 1), down__weight=sign(down, 1, transposed=True), table__weight=sign(table, 1)
        ),
        "planes": delta(net, up__weight=sign(up, 2, planes=2, cols=True), head__weight=sign(head, 2, planes=2)),
        "rank": delta(net, up__weight=sign(up, 3, rank=3), down__weight=sign(down, 3, rank=1, transposed=True)),
        "same": delta(net, up__weight=Same(tuple(up.shape), up.dtype), norm__weight=dense(net.norm.weight, 4)),
        "dense": delta(net, up__weight=dense(up, 5), down__weight=dense(down, 5), table__weight=dense(table, 5)),
        "other": delta(net, up__weight=dense(up, 6), up__bias=dense(net.up.bias, 6), head__weight=dense(head, 6)),
        "rows": delta(
            net,
            up__weight=rows(up, 7, [3, 17]),
            down__weight=rows(down, 7, [0, K - 1], transposed=True),
            table__weight=rows(table, 7, [0, 2, V - 1], over=sign(table, 7)),
        ),
        "grown": delta(
            net,
            table__weight=rows(table, 8, [5, V, V + 1], V + 2, over=sign(table, 8)),
            head__weight=rows(head, 8, [V, V + 1], V + 2),
        ),
        "grown more": delta(net, table__weight=rows(table, 9, [V, V + 1, V + 2, V + 3], V + 4)),
    }


def alone(net: Net, tenant: bdc.Delta | None, ids: Tensor) -> Tensor:
    model = copy.deepcopy(net)
    for name, encoding in tenant.encodings.items() if tenant is not None else ():
        model.get_parameter(name).data = encoding.apply(net.get_parameter(name).detach())
    with torch.no_grad():
        return model(ids)


def test_encodings_of_all_kinds_side_by_side(net: Net) -> None:
    known = of_each_kind(net)
    model = bdc.attach(net, known, lower="eager")
    names: list[str | None] = [*known, None, "sign", "dense"]
    ids = torch.randint(V, (len(names), 6), generator=torch.Generator().manual_seed(1))
    ids[names.index("rows"), :2] = torch.tensor([V - 1, 2])
    ids[names.index("grown"), :3] = torch.tensor([V + 1, 5, V])
    ids[names.index("grown more"), 0] = V + 3
    found = model(ids, tenants=names)
    for row, name in enumerate(names):
        own = alone(net, known[name] if name is not None else None, ids[row : row + 1])
        size = own.shape[-1]
        torch.testing.assert_close(found[row : row + 1, :, :size], own, rtol=1e-4, atol=1e-4)
        assert found[row, :, size:].eq(-torch.inf).all()
        if name is not None and ids[row].max() < V:
            plain = alone(net, None, ids[row : row + 1])
            assert (own[..., :V] - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("called_before", [False, True])
def test_tenants_of_a_bank_that_began_empty(net: Net, called_before: bool) -> None:
    """Nobody has said that `down` is stored [K, N]: the first graph or the first tenant that knows does."""
    known = of_each_kind(net)
    model = bdc.attach(net, {}, reserve=Reserve(planes=2, col_scale=True, rank=3, rows=3, dense=3), lower="eager")
    ids = torch.randint(V, (5, 6), generator=torch.Generator().manual_seed(1))
    names: list[str | None] = ["dense", None, "sign", "rank", "rows"]
    if called_before:
        torch.testing.assert_close(model(ids, tenants=[None] * 5), alone(net, None, ids), rtol=1e-4, atol=1e-4)
    for name in names:
        if name is not None:
            model.add(name, known[name])
    graphs = model._graphs.graphs
    found = model(ids, tenants=names)
    assert model._graphs.graphs == (graphs if called_before else 1)
    for row, name in enumerate(names):
        own = alone(net, known[name] if name is not None else None, ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], own, rtol=1e-4, atol=1e-4)


def test_an_added_token_in_anothers_row_is_an_error(net: Net) -> None:
    model = bdc.attach(net, of_each_kind(net), lower="eager")
    for token, fine, others in ((V + 1, "grown", ("sign", None, "dense")), (V + 3, "grown more", ("grown", None))):
        ids = torch.zeros(3, 4, dtype=torch.int64)
        ids[1, 2] = token
        assert model(ids, tenants=["grown", fine, None]).shape == (3, 4, V + 2)
        for other in others:
            with pytest.raises(IndexError):
                model(ids, tenants=["grown", other, None])


def bits(bank: Bank) -> dict[str, Tensor]:
    stacks = {f"{name}.{field}": value for name, each in bank.stacks.items() for field, value in each.tensors().items()}
    return {name: value.clone() for name, value in stacks.items()}


@contextlib.contextmanager
def nothing_changes(bank: Bank) -> Iterator[None]:
    before, tenants, slots = bits(bank), bank.tenants, {name: bank.slot(name) for name in bank.tenants}
    changed = {name: bank.changed(name) for name in bank.stacks}
    yield
    after = bits(bank)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (bank.tenants, {name: bank.slot(name) for name in bank.tenants}) == (tenants, slots)
    assert changed == {name: bank.changed(name) for name in bank.stacks}


@pytest.fixture
def bank(net: Net) -> Bank:
    first = {"a": delta(net, up__weight=sign(net.up.weight, 1), down__weight=sign(net.down.weight, 1, transposed=True))}
    return Bank(Base(net), first, SLOTS)


def damaged(base: Tensor) -> Sign:
    found = sign(base, 2)
    found.row_scale[0, 3] = torch.nan
    return found


def with_nan(base: Tensor) -> Dense:
    found = dense(base, 2)
    found.value.view(-1)[-1] = torch.inf
    return found


Make = Callable[[Net], dict[str, Any]]
REFUSED: dict[str, tuple[Make, type[BitDeltaError], str]] = {
    "planes": (
        lambda n: {"up__weight": sign(n.up.weight, 2, planes=2)},
        UnsupportedError,
        r"up\.weight.*planes=2 .*room for 1",
    ),
    "rank": (
        lambda n: {"up__weight": sign(n.up.weight, 2, rank=3)},
        UnsupportedError,
        r"up\.weight.*rank=3 .*room for 0",
    ),
    "columns": (lambda n: {"up__weight": sign(n.up.weight, 2, cols=True)}, UnsupportedError, r"up\.weight.*col_scale"),
    "rows": (lambda n: {"up__weight": rows(n.up.weight, 2, [1, 2])}, UnsupportedError, r"up\.weight.*rows=2"),
    "rows over planes": (
        lambda n: {"up__weight": rows(n.up.weight, 2, [1], over=sign(n.up.weight, 2, planes=2))},
        UnsupportedError,
        r"up\.weight.*planes=2.*rows=1",
    ),
    "dense": (lambda n: {"up__weight": dense(n.up.weight, 2)}, UnsupportedError, r"up\.weight.*dense=1"),
    "grown": (
        lambda n: {"head__weight": rows(n.head.weight, 2, [V, V + 1], V + 2)},
        UnsupportedError,
        rf"head\.weight.*rows=2.*out_features={V + 2}",
    ),
    "the other orientation": (
        lambda n: {"down__weight": sign(n.down.weight.T, 2)},
        UnsupportedError,
        r"down\.weight has shape",
    ),
    "a shape of its own": (
        lambda n: {"norm__bias": dense(rand(K + 1), 2)},
        UnsupportedError,
        r"norm\.bias has shape \[48\]",
    ),
    "shrunk": (
        lambda n: {
            "head__weight": Rows(
                (V - 3, K), torch.float32, torch.zeros(0, dtype=torch.int64), torch.zeros(0, K), sign(n.head.weight, 2)
            )
        },
        UnsupportedError,
        r"head\.weight has shape \[90, 48\] in the base and \[87, 48\]",
    ),
    "more columns": (lambda n: {"up__weight": sign(rand(N, K + 1), 2)}, UnsupportedError, r"up\.weight has shape"),
    "a parameter that the base lacks": (
        lambda n: {"score__weight": dense(n.up.weight, 2)},
        UnsupportedError,
        r"has score\.weight, which the base does not",
    ),
    "NaN scales": (lambda n: {"up__weight": damaged(n.up.weight)}, DeltaFileError, r"up\.weight: row_scale holds NaN"),
    "infinite values": (
        lambda n: {"norm__bias": with_nan(n.norm.bias)},
        DeltaFileError,
        r"norm\.bias: value holds NaN",
    ),
    "NaN beneath rows": (
        lambda n: {"up__weight": rows(n.up.weight, 2, [1], over=damaged(n.up.weight))},
        DeltaFileError,
        "row_scale holds NaN",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("replace", [False, True])
def test_what_does_not_fit_is_refused_and_changes_nothing(net: Net, bank: Bank, name: str, replace: bool) -> None:
    make, error, message = REFUSED[name]
    good = {"norm__weight": dense(net.norm.weight, 2), "table__weight": sign(net.table.weight, 2)}
    with nothing_changes(bank), pytest.raises(error, match=message):
        bank.add("a" if replace else "b", delta(net, **good, **make(net)), replace=replace)


def test_every_lack_of_room_has_its_reserve(net: Net) -> None:
    """What `reserve` names is room for what was refused without it."""
    room = Reserve(planes=2, col_scale=True, rank=3, rows=3, dense=2)
    bank = Bank(Base(net), {}, SLOTS, {"up.weight": room, "head.weight": Reserve(planes=1, rows=2, out_features=V + 2)})
    for name in ("planes", "rank", "columns", "rows", "rows over planes", "dense", "grown"):
        make = REFUSED[name][0]
        bank.add("b", delta(net, **make(net)))
        bank.remove("b")


def test_reserve_of_an_unknown_parameter(net: Net) -> None:
    with pytest.raises(UnsupportedError, match=r"reserve names up\.wait"):
        Bank(Base(net), {}, SLOTS, {"up.wait": Reserve(planes=2)})


def test_a_small_table_that_grew_is_refused() -> None:
    base = nn.Sequential(nn.Embedding(10, 4))
    grown = rows(base[0].weight, 1, [10], 11)
    with pytest.raises(UnsupportedError, match=r"0\.weight has shape \[10, 4\] in the base and \[11, 4\].*too small"):
        Bank(Base(base), {"a": delta(base, **{"0__weight": grown})}, 2)


def test_names(net: Net, bank: Bank) -> None:
    fine = delta(net)
    with nothing_changes(bank):
        with pytest.raises(UnsupportedError, match="there is a tenant a already"):
            bank.add("a", fine)
        with pytest.raises(UnsupportedError, match=r"no tenant 'b': the tenants are a; None is the base"):
            bank.add("b", fine, replace=True)
        with pytest.raises(UnsupportedError, match="no tenant 'b'"):
            bank.remove("b")
        with pytest.raises(UnsupportedError, match="no tenant 'b'"), bank.lease(["a", "b"]):
            pass
        with pytest.raises(UnsupportedError, match="no tenant 'b'"):
            bank.slot("b")
        for name in ("", 3, None):
            with pytest.raises(UnsupportedError, match="a tenant's name is a string"):
                bank.add(name, fine)  # type: ignore[arg-type]
    bank.remove("a")  # a lease that was refused holds nothing


def test_too_few_slots_and_a_full_bank(net: Net, bank: Bank) -> None:
    with pytest.raises(UnsupportedError, match="1 slots cannot hold 2 tenants"):
        Bank(Base(net), {"a": delta(net), "b": delta(net)}, 1)
    for name in "bcd":
        bank.add(name, delta(net))
    with nothing_changes(bank), pytest.raises(UnsupportedError, match="all 4 slots are taken"):
        bank.add("e", delta(net, up__bias=dense(net.up.bias, 1)))
    with nothing_changes(bank), pytest.raises(UnsupportedError, match="all 4 slots are taken"):
        bank.add("a", delta(net, up__bias=dense(net.up.bias, 1)), replace=True)
    bank.remove("b")
    bank.add("e", delta(net))
    assert bank.tenants == ("a", "c", "d", "e")


def test_another_base_is_refused(net: Net, bank: Bank) -> None:
    other = copy.deepcopy(net)
    nn.init.normal_(other.up.weight)
    with nothing_changes(bank), pytest.raises(BaseMismatchError):
        bank.add("b", delta(other, up__weight=sign(net.up.weight, 2)))


def test_one_tensor_of_the_base_that_is_two_in_the_fine_tune(net: Net) -> None:
    net.head.weight = net.table.weight
    both = delta(net, table__weight=sign(net.table.weight, 1), head__weight=sign(net.table.weight, 2))
    with pytest.raises(UnsupportedError, match=r"table\.weight and head\.weight are one tensor in the base but two"):
        Bank(Base(net), {"a": both}, SLOTS)
    tied = delta(net, {"head.weight": "table.weight"}, table__weight=sign(net.table.weight, 1))
    bank = Bank(Base(net), {"a": tied}, SLOTS)
    assert "head.weight" not in bank.stacks
    assert bank.changed("table.weight") == ("a",)


def test_replacing_writes_another_slot(net: Net, bank: Bank) -> None:
    old = bank.slot("a")
    held = {name: value[old].clone() for name, value in bits(bank).items()}
    with bank.lease(["a", None, "a"]) as slots:
        assert slots == (old, -1, old)
        bank.add("a", delta(net, up__weight=sign(net.up.weight, 2)), replace=True)
        assert bank.slot("a") != old
        for name in "bc":  # all other slots
            bank.add(name, delta(net, up__weight=sign(net.up.weight, 3)))
        with pytest.raises(UnsupportedError, match="all 4 slots are taken"):
            bank.add("d", delta(net))
        for name, value in bits(bank).items():
            assert torch.equal(value[old], held[name])
    bank.add("d", delta(net))
    assert bank.slot("d") == old


def test_a_tenant_in_use_is_not_removed(bank: Bank) -> None:
    with bank.lease([None]):
        pass
    in_use = pytest.raises(UnsupportedError, match=r"tenant a is in use by 3 running call")
    with bank.lease(["a", "a"]), bank.lease(["a"]), nothing_changes(bank), in_use:
        bank.remove("a")
    with contextlib.suppress(ZeroDivisionError), bank.lease(["a"]):
        raise ZeroDivisionError
    bank.remove("a")
    assert bank.tenants == ()


def test_a_slot_keeps_nothing_of_its_last_tenant(net: Net) -> None:
    """Every float of a free slot poisoned: the next tenant's rows are what they are in a fresh bank."""
    known = of_each_kind(net)
    model = bdc.attach(net, known, slots=len(known), lower="eager")
    ids = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(1))
    bank = model._bank
    for name in known:
        before = model(ids, tenants=[name, None])
        slot = bank.slot(name)
        bank.remove(name)
        for stack in bank.stacks.values():
            for field, tensor in stack.tensors().items():
                if field == "dense" and stack.place is not None:
                    live = {int(stack.place[bank.slot(other)]) for other in bank.tenants}
                    for entry in set(range(len(tensor))) - live:
                        tensor[entry] = torch.nan
                elif tensor.is_floating_point():
                    tensor[slot] = torch.nan
        bank.add(name, known[name])
        assert bank.slot(name) == slot
        assert torch.equal(model(ids, tenants=[name, None]), before)


def test_dense_matrices_have_a_spare_for_replacing(net: Net) -> None:
    bank = Bank(Base(net), {"a": delta(net, up__weight=dense(net.up.weight, 1))}, SLOTS)
    stack = bank.stacks["up.weight"]
    assert stack.dense is not None
    assert stack.place is not None
    first = int(stack.place[bank.slot("a")])
    with bank.lease(["a"]):
        bank.add("a", delta(net, up__weight=dense(net.up.weight, 2)), replace=True)
        assert int(stack.place[bank.slot("a")]) != first
        with nothing_changes(bank), pytest.raises(UnsupportedError, match=r"up\.weight.*dense="):
            bank.add("b", delta(net, up__weight=dense(net.up.weight, 3)))
    bank.add("b", delta(net, up__weight=dense(net.up.weight, 3)))
    assert int(stack.place[bank.slot("b")]) == first
    assert torch.equal(stack.dense[first], dense(net.up.weight, 3).value)


def test_growing_makes_room_for_one_more_dense_matrix(net: Net) -> None:
    given = [delta(net, up__weight=dense(net.up.weight, seed)) for seed in range(4)]
    bank = Bank(Base(net), {"0": given[0], "1": given[1]}, SLOTS + 1)
    bank.add("2", given[2])
    with nothing_changes(bank), pytest.raises(UnsupportedError, match="dense="):
        bank.add("3", given[3])
    wider = bank.grown(None, None, [given[3]])
    wider.add("3", given[3])
    for name, each in enumerate(given):
        stack = wider.stacks["up.weight"]
        assert stack.dense is not None
        assert stack.place is not None
        entry = int(stack.place[wider.slot(str(name))])
        assert torch.equal(stack.dense[entry], each.encodings["up.weight"].value)  # type: ignore[attr-defined]


def test_what_graphs_take_for_the_bases_is_refused_unless_a_tenant_has_come(net: Net, bank: Bank) -> None:
    changed = next(name for name in bank.stacks if bank.changed(name))
    free = next(name for name in bank.stacks if not bank.changed(name))
    with nothing_changes(bank):
        assert not bank.refuse({free: "why", changed: "why"})
    assert not bank.refused
    assert bank.refuse({free: "why"})
    assert bank.refused == {free: "why"}


def test_a_bank_made_under_inference_mode_is_written_outside_it(net: Net) -> None:
    with torch.inference_mode():
        bank = Bank(Base(net), {"a": delta(net, up__weight=sign(net.up.weight, 1))}, SLOTS)
        grown = bank.grown(SLOTS + 1, None, [])
    for each in (bank, grown):
        each.add("b", delta(net, up__weight=sign(net.up.weight, 2)))


def test_growing_keeps_what_tenants_have_or_is_refused(net: Net, bank: Bank) -> None:
    wider = bank.grown(6, {"up.weight": Reserve(planes=2, rank=2, dense=2, rows=3)}, [])
    for field, value in slot_of(bank, "a", "up.weight").items():
        kept = slot_of(wider, "a", "up.weight")[field]
        assert torch.equal(kept[: value.shape[0]], value)
    with nothing_changes(bank), pytest.raises(UnsupportedError, match=r"up\.weight has room for planes"):
        bank.grown(None, {"up.weight": Reserve(small=True)}, [])


def slot_of(bank: Bank, name: str, parameter: str) -> dict[str, Tensor]:
    return {field: value[bank.slot(name)] for field, value in bank.stacks[parameter].tensors().items()}
