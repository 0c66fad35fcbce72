"""Small parameters per row: each kind of operation between a parameter and the rows, against every row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdelta_compile.encodings import Dense
from bitdelta_compile.errors import UnsupportedError
from bitdelta_compile.graph.context import NoRowForm

R, S, H, V = 4, 5, 6, 7
aten = torch.ops.aten
Forward = Callable[..., Any]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class With(nn.Module):
    """`call(x, w, v)` with parameters w and v."""

    def __init__(self, call: Forward, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.call = call
        self.own = nn.ParameterList([nn.Parameter(rand(*shape, seed=at).to(dtype)) for at, shape in enumerate(shapes)])

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs, *[self.own[at] for at in range(len(self.own))])


def add_in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * 1.0
    y += w
    y.mul_(w).add_(w)
    return y


def iota(x: Tensor) -> Tensor:
    return torch.arange(S, device=x.device)


H_ = ((H,),)
ROW = ((1, S, H),)
# what is done with the parameters, and their shapes
CASES: dict[str, tuple[Forward, tuple[tuple[int, ...], ...]]] = {
    "x * w": (lambda x, w: x * w, H_),
    "w - x": (lambda x, w: w - x, H_),
    "x + w of rank 0": (lambda x, w: x + w, ((),)),
    "x + w of all dimensions": (lambda x, w: x + w, ROW),
    "x + w of places": (lambda x, w: x + w, ((S, 1),)),
    "x + w by alpha": (lambda x, w: torch.add(x, w, alpha=2), H_),
    "aten.add": (lambda x, w: aten.add.Tensor(x, w), H_),
    "aten.mul of aten.add": (lambda x, w, v: aten.mul.Tensor(x, aten.add.Tensor(w, v)), ((H,), (1, H))),
    "in place": (add_in_place, H_),
    "where": (lambda x, w, v: torch.where(x > 0, w, v), ((H,), ())),
    "clamp": (lambda x, w: torch.clamp(x, min=w), H_),
    "compared": (lambda x, w: (x > w).float() + w, H_),
    "1 + w": (lambda x, w: x * (1.0 + w.float()).type_as(x), H_),
    "w to x": (lambda x, w: x * w.to(x), H_),
    "x to w": (lambda x, w: x.type_as(w) * w, H_),
    "exp(w)": (lambda x, w: x * w.exp(), ((),)),
    "two parameters": (lambda x, w, v: x * (w * v) + v, ((H,), (1, H))),
    "merged rows": (lambda x, w: (x.reshape(-1, H) * w).view(x.shape[0], S, H), H_),
    "merged rows, w of one": (lambda x, w: (x.reshape(-1, H) + w).view(-1, S, H), ((1, H),)),
    "merged heads": (lambda x, w: (x.view(-1, 2, 3) * w).reshape(x.shape[0], S, H), ((3,),)),
    "rows in the middle": (lambda x, w: (x.transpose(0, 1) + w).transpose(0, 1), ((1, H),)),
    "rows in the middle, w of places": (lambda x, w: (x.transpose(0, 1) + w).transpose(0, 1), ((S, 1, H),)),
    "rows at the end": (lambda x, w: (x.permute(2, 1, 0) * w).permute(2, 1, 0), ((H, 1, 1),)),
    "transpose of w": (lambda x, w: x + w.transpose(0, -1), ((H, S),)),
    "transpose by name": (lambda x, w: x + torch.transpose(w, dim0=-2, dim1=-1), ((H, S),)),
    "aten.transpose of w": (lambda x, w: x + aten.transpose.int(w, 1, 0), ((H, S),)),
    "w.t()": (lambda x, w: x + w.t(), ((H, S),)),
    "w.T": (lambda x, w: x + w.T, ((H, S),)),
    "w.mT": (lambda x, w: (x + w.mT)[..., 0, :], ((1, H, S),)),
    "permute of w": (lambda x, w: x + w.permute(-1, 0, 1), ((S, H, 1),)),
    "permute of w as a list": (lambda x, w: x + torch.permute(w, (2, 0, 1)), ((S, H, 1),)),
    "aten.permute of w": (lambda x, w: x + aten.permute.default(w, [-1, -3, -2]), ((S, H, 1),)),
    "unsqueeze of w": (lambda x, w: x + w.unsqueeze(0).unsqueeze(-2), H_),
    "unsqueeze behind": (lambda x, w: x + w.unsqueeze(-1), ((S,),)),
    "flatten of w": (lambda x, w: x + w.flatten(), ((2, 3),)),
    "flatten of w from behind": (lambda x, w: x + w.flatten(-2), ((1, 2, 3),)),
    "flatten of w to the front": (lambda x, w: (x + w.flatten(end_dim=1)), ((1, S, H),)),
    "view of w": (lambda x, w: x + w.view(1, 1, -1), H_),
    "reshape of w": (lambda x, w: x + w.reshape((S, H)), ((H, S),)),
    "aten.view of w": (lambda x, w: x + aten.view.default(w, [1, H]), H_),
    "w[None, :]": (lambda x, w: x + w[None, :], H_),
    "w[..., :-1]": (lambda x, w: x + w[..., :-1], ((H + 1,),)),
    "w[:S]": (lambda x, w: x + w[:S], ((S + 2, H),)),
    "w[1]": (lambda x, w: x + w[1], ((3, H),)),
    "w[:, -1]": (lambda x, w: x + w[:, -1], ((S, 3, H),)),
    "aten.select and slice": (lambda x, w: x + aten.slice.Tensor(aten.select.int(w, -2, 1), 1, 1), ((S, 3, H + 1),)),
    "sizes of w": (lambda x, w: x[:, : w.size(-2)] + w[: w.shape[0]], ((S, H),)),
    "w over rows": (lambda x, w: torch.cat([x, w.expand(x.shape[0], -1, -1)], 1), ROW),
    "w over rows, without their dimension": (lambda x, w: torch.cat([x, w.expand(x.shape[0], S, H)], 1), ((S, H),)),
    "w over rows and places": (lambda x, w: torch.cat([x, w.expand(x.shape[0], S, H)], 1), H_),
    "w over places": (lambda x, w: x + w.expand(S, -1), H_),
    "w over more places": (lambda x, w: x + w.expand(1, S, H), H_),
    "w over places, broadcast_to": (lambda x, w: x + torch.broadcast_to(w, (S, H)), H_),
    "layer_norm": (lambda x, w, v: F.layer_norm(x, (H,), w, v), ((H,), (H,))),
    "layer_norm by keyword": (lambda x, w, v: F.layer_norm(x, (H,), bias=v, weight=w, eps=0.1), ((H,), (H,))),
    "layer_norm of two dimensions": (lambda x, w, v: F.layer_norm(x, (S, H), w, v), ((S, H), (S, H))),
    "layer_norm without bias": (lambda x, w: F.layer_norm(x, (H,), w, None, 1e-3), H_),
    "layer_norm of merged rows": (lambda x, w, v: F.layer_norm(x.view(-1, H), (H,), w, v).view(-1, S, H), ((H,), (H,))),
    "layer_norm of rows in the middle": (
        lambda x, w, v: F.layer_norm(x.transpose(0, 1), (H,), w, v).transpose(0, 1), ((H,), (H,))
    ),
    "aten.layer_norm": (lambda x, w, v: aten.layer_norm.default(x, [H], w, v), ((H,), (H,))),
    "layer_norm of a parameter": (lambda x, w, v: x + F.layer_norm(w, (H,), v), ((S, H), (H,))),
    "plain layer_norm of a parameter": (lambda x, w: x + F.layer_norm(w, (H,)), ((S, H),)),
    "layer_norm of what is the same": (lambda x, w: x + F.layer_norm(torch.ones(S, H).cumsum(-1), (H,), w), H_),
    "rms_norm": (lambda x, w: F.rms_norm(x, (H,), w), H_),
    "rms_norm with eps": (lambda x, w: F.rms_norm(x, (H,), w, 0.1), H_),
    "aten.rms_norm": (lambda x, w: aten.rms_norm.default(x, [H], w), H_),
    "linear": (lambda x, w: F.linear(x, w), ((3, H),)),
    "linear with bias": (lambda x, w, v: F.linear(x, w, v), ((3, H), (3,))),
    "linear by keyword": (lambda x, w, v: F.linear(input=x, weight=w, bias=v), ((3, H), (3,))),
    "linear with a bias made of w": (lambda x, w, v: F.linear(x, w, v * 2), ((3, H), (3,))),
    "linear with a plain matrix": (lambda x, w: F.linear(x, torch.ones(3, H).cumsum(0), w * 2), ((3,),)),
    "linear of merged rows": (lambda x, w, v: F.linear(x.view(-1, H), w, v).view(-1, S, 3), ((3, H), (3,))),
    "linear of a parameter": (lambda x, w, v: x + F.linear(w, v), ((S, 3), (H, 3))),
    "plain linear of a parameter": (lambda x, w: x + F.linear(w, torch.ones(H, 3).cumsum(0)), ((S, 3),)),
    "linear of what is the same": (lambda x, w: x + F.linear(torch.ones(S, 3).cumsum(0), w), ((H, 3),)),
    "x @ w": (lambda x, w: x @ w, ((H, 3),)),
    "x @ w.T": (lambda x, w: x @ w.T, ((3, H),)),
    "mm": (lambda x, w: torch.mm(x[:, 0], w), ((H, 3),)),
    "mm as a method": (lambda x, w: x[:, 0].mm(w), ((H, 3),)),
    "a parameter's mm": (lambda x, w: x + w.mm(torch.ones(3, H).cumsum(0)), ((S, 3),)),
    "addmm": (lambda x, w, v: torch.addmm(v, x.view(-1, H), w).view(-1, S, 3), ((H, 3), (3,))),
    "lookup": (lambda x, w: F.embedding(x[..., 0].abs().long(), w), ((V, H),)),
    "lookup of merged rows": (lambda x, w: F.embedding(x[..., 0].abs().long().view(-1), w).view(-1, S, H), ((V, H),)),
    "lookup of what is the same": (lambda x, w: x + F.embedding(iota(x), w), ((V, H),)),
    "lookup of one": (lambda x, w: x + torch.embedding(w, iota(x)[None]), ((V, H),)),
    "aten.embedding": (lambda x, w: x + aten.embedding.default(w, iota(x)), ((V, H),)),
    "relative bias": (
        lambda x, w: F.scaled_dot_product_attention(
            *(x.view(-1, S, 2, 3).transpose(1, 2),) * 3,
            attn_mask=F.embedding((iota(x)[:, None] - iota(x)).abs(), w).permute(2, 0, 1).unsqueeze(0),
        ),
        ((V, 2),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_row_has_its_own(many: Any, name: str) -> None:
    call, shapes = CASES[name]
    many(With(call, *shapes), rand(R, S, H)).check()


@pytest.mark.parametrize("name", ["x * w", "layer_norm", "rms_norm", "linear with bias", "lookup of one"])
def test_half_precision(many: Any, name: str) -> None:
    call, shapes = CASES[name]
    case = many(With(call, *shapes, dtype=torch.bfloat16), rand(R, S, H).bfloat16())
    found = case((1, -1, 0, 1))
    assert found.dtype == torch.bfloat16
    for row, slot in enumerate((1, -1, 0, 1)):
        expected = case.alone(row, slot)
        assert (found[row : row + 1] - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("call", [lambda x, w: x * w, lambda x, w: w.exp() + x, lambda x, w: torch.where(x > 0, x, w)])
def test_a_number_of_wider_dtype_leaves_the_dtype_alone(many: Any, call: Forward) -> None:
    case = many(With(call, ()), rand(R, S, H).bfloat16())
    found = case((1, -1, 0, 1))
    assert found.dtype == torch.bfloat16
    for row, slot in enumerate((1, -1, 0, 1)):
        torch.testing.assert_close(found[row : row + 1], case.alone(row, slot), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("slots", [(-1, -1, -1, -1), (0, 1, 2, 0), (1, 1, 1, 1), (2, -1, -1, 0)])
def test_rows_do_not_depend_on_each_other(many: Any, slots: tuple[int, ...]) -> None:
    call, shapes = CASES["layer_norm"]
    case = many(With(lambda x, w, v, u: F.linear(call(x, w, v), u), *shapes, (3, H)), rand(R, S, H))
    found = case(slots)
    for row, slot in enumerate(slots):
        others = [(slot + 2 + at) % 3 for at in range(R)]
        others[row] = slot
        assert torch.equal(case(others)[row], found[row])


def test_a_slot_that_is_none_is_the_base(many: Any) -> None:
    case = many(With(CASES["x * w"][0], (H,)), rand(R, S, H))
    found = case((7, -3, 3, -1))
    assert torch.equal(found, case((-1,) * R))
    assert torch.equal(found[:1], case.alone(0, -1))


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows(many: Any, rows: int) -> None:
    call, shapes = CASES["layer_norm"]
    case = many(With(call, *shapes), rand(rows, S, H), rows=rows)
    found = case((1,) * rows)
    torch.testing.assert_close(found[:1], case.alone(0, 1))


@pytest.mark.parametrize("name", ["lookup of one", "x + w of all dimensions"])
def test_returned_without_meeting_rows(many: Any, name: str) -> None:
    """The graph's own result leads with one row for all; each has its own here."""

    def call(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.embedding(w, iota(x)[None]) if name == "lookup of one" else w * 2.0), x * 1.0

    case = many(With(call, (V, H) if name == "lookup of one" else (1, S, H)), rand(R, S, H))
    found, _ = case((1, -1, 0, 1))
    assert found.shape == (R, S, H)
    for row, slot in enumerate((1, -1, 0, 1)):
        assert torch.equal(found[row : row + 1], case.alone(row, slot)[0])


def test_returned_without_a_place_for_rows(many: Any) -> None:
    case = many(With(lambda x, w: (w * 2.0, x * 1.0), (H,)), rand(R, S, H))
    with pytest.raises(NoRowForm, match=r"own\.0 .* has no dimension for the rows"):
        case((0, 1, -1, 0))


REFUSED: dict[str, tuple[Forward, tuple[int, ...], str]] = {
    "softmax": (lambda x, w: x + w.softmax(-1), (H,), "softmax"),
    "sum": (lambda x, w: x + w.sum(), (H,), "sum"),
    "einsum": (lambda x, w: torch.einsum("bsh,ho->bso", x, w), (H, 3), "einsum"),
    "convolution": (lambda x, w: F.conv1d(x.transpose(1, 2), w), (3, H, 1), "conv1d"),
    "cat with others": (lambda x, w: x + torch.cat([w, torch.ones(1, H)]), (S - 1, H), "cat"),
    "indexed by tensors": (lambda x, w: w[x[..., 0].abs().long()], (V, H), "getitem"),
    "an index itself": (lambda x, w: torch.arange(9)[w.long().abs()] + x, (H,), "getitem"),
    "written to what is the same": (lambda x, w: x + torch.zeros(S, H).add_(w), (H,), "add_"),
    "a fill": (lambda x, w: x + torch.ones(S, H).masked_fill_(w > 0, 0.0), (H,), "masked_fill_"),
    "shuffled rows": (lambda x, w: x.flip(0) * w, (H,), "mul"),
    "the sum over rows": (lambda x, w: x.sum(0) * w, (H,), "mul"),
    "rows against rows": (lambda x, w: (x[:, 0] @ x[:, 0].T) * w, (), "mul"),
    "a vector of products": (lambda x, w: x @ w, (H,), "matmul"),
    "rows in the middle of a product": (lambda x, w: x.transpose(0, 1) @ w, (H, 3), "matmul"),
    "a product from the left": (lambda x, w: w @ x.transpose(1, 2), (3, H), "matmul"),
    "a product from the left, rows behind": (lambda x, w: w @ x[:, 0].T, (3, H), "matmul"),
    "expanded along rows behind": (
        lambda x, w: w[:, None].expand(S, x.shape[0], H) + x.transpose(0, 1),
        (S, H),
        "expand",
    ),
    "a query of its own": (
        lambda x, w: F.scaled_dot_product_attention(w.expand(x.shape[0], S, H) * 1.0, x, w[None]),
        (S, H),
        "scaled_dot_product_attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_names_parameter_op_and_tenants(many: Any, name: str) -> None:
    call, shape, op = REFUSED[name]
    case = many(With(call, shape), rand(R, S, H))
    with pytest.raises(NoRowForm, match=rf"own\.0 \(it differs in a, b\) is used by {op} .*cannot be done per row"):
        case((0, 1, -1, 0))


def test_max_norm_of_a_small_table(many: Any) -> None:
    case = many(With(lambda x, w: F.embedding(x[..., 0].abs().long(), w, max_norm=1.0), (V, H)), rand(R, S, H))
    with pytest.raises(UnsupportedError, match=r"own\.0 is looked up with max_norm"):
        case((0, 1, -1, 0))


def test_an_id_past_a_small_table_never_reads_another_tenants(many: Any) -> None:
    ids = torch.tensor([[1], [V], [2], [3]])
    case = many(With(lambda ids, w: F.embedding(ids, w), (V, H)), ids)
    with pytest.raises(IndexError):
        case((0, 1, -1, 0))


def test_what_nobody_changed_stays(many: Any) -> None:
    base = With(CASES["x * w"][0], (H,))
    case = many(base, rand(R, S, H), encodings=[{}, {}])
    assert torch.equal(case((0, 1, -1, 0)), base(rand(R, S, H)))
    tuned = [{"own.0": Dense((H,), torch.float32, rand(H, seed=9))}, {}]
    case = many(base, rand(R, S, H), encodings=tuned)
    assert torch.equal(case((0, 1, -1, 0))[1:3], base(rand(R, S, H))[1:3])
