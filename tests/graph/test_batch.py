"""Where the rows are: calls of all kinds on a value whose every entry is its row's number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdelta_compile.graph.batch import Batch, Lost, Place, RowsAt, places

B, S, H = 3, 5, 8
FRONT, MERGED, LOST = RowsAt(0), RowsAt(0, merged=True), "lost"
Call = Callable[[Tensor], Tensor]


def numbered(*sizes: int) -> Tensor:
    """[B, *sizes], every entry the number of its row."""
    return torch.arange(B, dtype=torch.float32).reshape(B, *[1] * len(sizes)).expand(B, *sizes).clone()


def backwards(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] - 1, -1, -1)


def assigned(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[backwards(x)] = x
    return y * 1


def assigned_in_a_view(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.transpose(0, 1)[:, backwards(x)] = x.transpose(0, 1)
    return y * 1


def assigned_to_places(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, torch.arange(S - 1, -1, -1)] = x
    y[:, 0] = x[:, 1]
    y[x < 0] = 7
    return y * 1


def copied_shuffled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:].copy_(x.flip(0)[:, 1:])
    return y * 1


def assigned_shuffled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 0] = x.flip(0)[:, 0]
    return y * 1


def along(x: Tensor) -> Tensor:
    return backwards(x)[:, None, None].expand(x.shape)


CASES: dict[str, tuple[Call, RowsAt | str]] = {
    "elementwise": (lambda x: x * 1, FRONT),
    "view": (lambda x: x.view(x.shape[0] * S, H), MERGED),
    "view with -1": (lambda x: x.view(-1, H), MERGED),
    "flatten": (lambda x: torch.flatten(x, 0, 1), MERGED),
    "flatten all": (lambda x: x.flatten(), MERGED),
    "merged and parted": (lambda x: x.reshape(-1, H).view(x.shape[0], S, H), FRONT),
    "merged and parted anew": (lambda x: x.reshape(-1, H).view(x.shape[0], S * 2, H // 2), FRONT),
    "unflatten": (lambda x: x.unflatten(2, (2, H // 2)), FRONT),
    "unsqueeze": (lambda x: x.unsqueeze(0), RowsAt(1)),
    "unsqueeze and squeeze": (lambda x: x.unsqueeze(0).squeeze(0), FRONT),
    "a dimension by None": (lambda x: x[None], RowsAt(1)),
    "transpose": (lambda x: x.transpose(0, 1) * 1, RowsAt(1)),
    "permute": (lambda x: x.permute(2, -2, 0), RowsAt(2)),
    "movedim": (lambda x: x.movedim(0, -1), RowsAt(2)),
    "transposed and merged": (lambda x: x.transpose(0, 1).reshape(-1, H), LOST),
    "transposed, merged and parted": (lambda x: x.transpose(0, 1).reshape(-1, H).view(S, x.shape[0], H), LOST),
    "transposed, merged behind": (lambda x: x.transpose(0, 1).reshape(S, -1), RowsAt(1, merged=True)),
    "merged, parted in the wrong order": (lambda x: x.reshape(-1, H).view(S, x.shape[0], H), LOST),
    "heads": (lambda x: x.view(x.shape[0], S, 2, 4).transpose(1, 2).reshape(-1, S, 4), MERGED),
    "heads outermost": (lambda x: x.view(x.shape[0], S, 2, 4).permute(2, 0, 1, 3).reshape(-1, S, 4), LOST),
    "view_as of lost rows": (lambda x: x.transpose(0, 1).reshape(-1).view_as(x), LOST),
    "slice of a row": (lambda x: x[:, 1:, ::2], FRONT),
    "place of a row": (lambda x: x[:, -1], FRONT),
    "last places": (lambda x: x[..., -1], FRONT),
    "slice of rows": (lambda x: x[1:], LOST),
    "every second row": (lambda x: x[::2], LOST),
    "one row": (lambda x: x[0], LOST),
    "all rows as a slice": (lambda x: x[: x.shape[0]], FRONT),
    "arange": (lambda x: torch.arange(x.shape[0]), FRONT),
    "arange of all": (lambda x: torch.arange(x.shape[0] * S) // S, MERGED),
    "picked by arange": (lambda x: x[torch.arange(x.shape[0]), x[:, 0, 0].long()], FRONT),
    "picked by arange of two dimensions": (
        lambda x: x[torch.arange(x.shape[0])[:, None], torch.arange(2)[None]], FRONT
    ),
    "picked by arange backwards": (lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)], LOST),
    "picked by a sorted arange": (lambda x: x[torch.arange(x.shape[0])[x[:, 0, 0].argsort(descending=True)]], LOST),
    "picked by an arange of others": (lambda x: x[torch.arange(2)[:, None].expand(2, x.shape[0])[0]], LOST),
    "picked by rows": (lambda x: x[x[:, 0, 0].long()], LOST),
    "first half of a repetition": (
        lambda x: x.repeat_interleave(2, 0)[torch.arange(2 * x.shape[0])[: x.shape[0]]], LOST
    ),
    "features picked": (lambda x: x[:, torch.tensor([2, 0])], FRONT),
    "index_select": (lambda x: x.index_select(0, x[:, 0, 0].long()), LOST),
    "index_select of features": (lambda x: x.index_select(-1, torch.tensor([3, 1])), FRONT),
    "gather": (lambda x: x.gather(0, torch.zeros_like(x, dtype=torch.int64)), LOST),
    "gather of features": (lambda x: x.gather(2, torch.zeros_like(x, dtype=torch.int64)), FRONT),
    "taken": (lambda x: torch.take(x, backwards(x)), LOST),
    "looked up": (lambda x: torch.nn.functional.embedding(backwards(x), x[:, 0]), LOST),
    "scattered to rows": (lambda x: torch.zeros_like(x).scatter(0, along(x), x), LOST),
    "added to rows": (lambda x: torch.zeros_like(x).index_add(0, backwards(x), x), LOST),
    "copied to rows": (lambda x: torch.zeros_like(x).index_copy_(0, backwards(x), x) * 1, LOST),
    "copied to places": (lambda x: torch.zeros_like(x).index_copy_(1, torch.arange(S - 1, -1, -1), x) * 1, FRONT),
    "scattered to features": (
        lambda x: x.scatter(2, torch.zeros_like(x, dtype=torch.int64), x), FRONT
    ),
    "put to rows": (lambda x: torch.zeros_like(x).index_put((backwards(x),), x), LOST),
    "assigned to rows": (assigned, LOST),
    "assigned to rows of a view": (assigned_in_a_view, LOST),
    "copied from shuffled rows": (copied_shuffled, LOST),
    "assigned from shuffled rows": (assigned_shuffled, LOST),
    "flip": (lambda x: x.flip(0), LOST),
    "flip of several": (lambda x: x.flip(1, 0), LOST),
    "flip of features": (lambda x: x.flip([1, -1]), FRONT),
    "flipud": (torch.flipud, LOST),
    "roll": (lambda x: torch.roll(x, 1, 0), LOST),
    "roll of all": (lambda x: torch.roll(x, 1), LOST),
    "roll of features": (lambda x: x.roll(shifts=1, dims=1), FRONT),
    "sort": (lambda x: x.sort(dim=0, descending=True)[0], LOST),
    "sort of features": (lambda x: x.sort(-1)[0], FRONT),
    "argsort": (lambda x: x.argsort(0), LOST),
    "topk": (lambda x: x.topk(x.shape[0], 0)[0], LOST),
    "topk of features": (lambda x: x.topk(2)[0], FRONT),
    "cat": (lambda x: torch.cat([x, x]), LOST),
    "cat of features": (lambda x: torch.cat([x, x], 1), FRONT),
    "stack in front": (lambda x: torch.stack([x, x]), RowsAt(1)),
    "stack in front, merged": (lambda x: torch.stack([x, x]).flatten(0, 1), LOST),
    "stack behind, merged": (lambda x: torch.stack([x, x], 1).flatten(0, 1), MERGED),
    "repeat": (lambda x: x.repeat(2, 1, 1), LOST),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), MERGED),
    "repeat_interleave of features": (lambda x: x.repeat_interleave(2, dim=1), FRONT),
    "repeat_interleave of all": (lambda x: x.repeat_interleave(2), MERGED),
    "repeat_interleave of all, rows behind": (lambda x: x.transpose(0, 1).repeat_interleave(2), LOST),
    "half of a repetition": (lambda x: x.repeat_interleave(2, 0).chunk(2)[0], LOST),
    "front of a repetition": (lambda x: x.repeat_interleave(2, 0)[: x.shape[0]], LOST),
    "chunk of features": (lambda x: x.chunk(2, -1)[1], FRONT),
    "unbind": (lambda x: x.unbind(1)[2], FRONT),
    "sum": (lambda x: x.sum(0), LOST),
    "mean of a row": (lambda x: x.mean(1), FRONT),
    "mean of all": (lambda x: x.mean(), LOST),
    "max": (lambda x: x.max(2)[0], FRONT),
    "similarity": (lambda x: x[:, 0] @ x[:, 0].T, LOST),
    "with shuffled rows": (lambda x: x + x.flip(0), LOST),
    "padding": (lambda x: torch.nn.functional.pad(x, (1, 1), value=1.0)[..., 1:-1], FRONT),
}  # fmt: skip


def test_assignments_within_rows_leave_them_where_they_are(capture: Any) -> None:
    captured = capture(lambda x: (assigned_to_places(x), x * 1.0), numbered(S, H), rows=B)
    assert places(captured.gm.graph, captured.batch)[captured.results[0]] == FRONT


def check_rows(value: Tensor, place: RowsAt) -> None:
    """Every entry is the number of the row that it is said to belong to."""
    by_row = value.movedim(place.dim, 0)
    assert (by_row.shape[0] == B) is not place.merged
    for row, part in enumerate(by_row.reshape(B, -1)):
        assert part.eq(row).all()


@pytest.mark.parametrize("name", CASES)
def test_calls(capture: Any, name: str) -> None:
    call, expected = CASES[name]
    captured = capture(lambda x: (call(x), x * 1.0), numbered(S, H), rows=B)
    found = places(captured.gm.graph, captured.batch)[captured.results[0]]
    if expected == LOST:
        assert isinstance(found, Lost)
    else:
        assert isinstance(found, RowsAt)
        assert found == expected
        check_rows(captured.result[0], found)


OTHERS: dict[str, tuple[Call, Place]] = {
    "the same for every row": (lambda x: torch.arange(S) * 2.0, None),
    "made for every row": (lambda x: torch.zeros(x.shape[0], S), FRONT),
    "made like rows": (lambda x: x.new_zeros(S, S), None),
    "made like rows, one each": (lambda x: x.new_zeros(S, x.shape[0]), RowsAt(1)),
    "of the rows' dtype": (lambda x: torch.arange(S).type_as(x), None),
    "spread over rows": (lambda x: torch.arange(S).expand(x.shape[0], S), FRONT),
    "like rows": (torch.zeros_like, FRONT),
    "compared with the mean of all": (lambda x: x - x.mean(0), FRONT),
}


@pytest.mark.parametrize("name", OTHERS)
def test_values_of_no_row(capture: Any, name: str) -> None:
    call, expected = OTHERS[name]
    captured = capture(lambda x: (call(x), x * 1.0), numbered(S, H), rows=B)
    assert places(captured.gm.graph, captured.batch)[captured.results[0]] == expected


def test_lost_says_since_when(capture: Any) -> None:
    captured = capture(lambda x: x.flip(0).reshape(-1, H) * 2.0, numbered(S, H), rows=B)
    (result,) = captured.results
    found = places(captured.gm.graph, captured.batch)[result]
    assert isinstance(found, Lost)
    assert found.op == "flip"


def test_inputs_that_meet_nowhere_have_a_batch_each(capture: Any) -> None:
    captured = capture(lambda x, y: (x * 2.0, y.transpose(0, 1) * 2.0), numbered(S, H), numbered(S + 1, H), rows=B)
    assert len(captured.batch.symbols) == 2
    found = places(captured.gm.graph, captured.batch)
    assert [found[node] for node in captured.results] == [RowsAt(0), RowsAt(1)]


def test_inputs_that_meet_have_one(capture: Any) -> None:
    captured = capture(lambda x, y: x + y, numbered(S, H), numbered(S, H), rows=B)
    assert len(captured.batch.symbols) == 1


def test_one_row_has_nothing_to_track(capture: Any) -> None:
    captured = capture(lambda x: x.flip(0), numbered(S, H)[:1], rows=1)
    assert captured.batch == Batch(1)
    assert set(places(captured.gm.graph, captured.batch).values()) == {None}


def test_a_batch_of_fixed_size_cannot_be_followed(capture: Any) -> None:
    assert capture(lambda x: x * 2.0, numbered(S, H), rows=B, mark=False).batch is None
    assert capture(lambda x: x.view(B, -1) * 2.0, numbered(S, H), rows=B).batch is None
