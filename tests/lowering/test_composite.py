"""The composite ops against a loop over the entries of the row index, on dense tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bitdelta_compile.lowering import composite as _composite  # noqa: F401  registers bitdelta::
from torch import Tensor

ops = torch.ops.bitdelta
T, R, M, N, K, C, G = 4, 4, 3, 7, 5, 3, 2  # slots, entries, rows of an entry, out, in, stored rows, rows grown by
# entry 1 is the base, entry 3 no slot at all; slot 1 is in no use
TENANT = [2, -1, 0, 9]
UNUSED = 1


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def index(tenant: list[int] | None) -> Tensor | None:
    return None if tenant is None else torch.tensor(tenant, dtype=torch.int32)


def per_entry(tenant: list[int] | None, entry: Callable[[int, int | None], Tensor]) -> Tensor:
    """What `entry(r, slot)` gives, one behind the other; slot is None without one, and without a row index 0."""
    if tenant is None:
        return entry(0, 0)
    return torch.cat([entry(r, slot if 0 <= slot < T else None) for r, slot in enumerate(tenant)])


def part(value: Tensor, r: int, tenant: list[int] | None) -> Tensor:
    """Entry r's part of a value that leads with the rows."""
    return value if tenant is None else value.chunk(len(tenant))[r]


def check(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=False)


# one tensor row per entry, several in front, and several dimensions
SHAPES = [(R,), (R * M,), (R, M), (R, 1, M)]
INDICES = [TENANT, [-1] * R, [0, 0, 0, 0], None]
per_shape = pytest.mark.parametrize("shape", SHAPES)
per_index = pytest.mark.parametrize("tenant", INDICES, ids=["mixed", "base", "identical", "none"])


def stored() -> tuple[Tensor, Tensor]:
    """Stored rows of every slot, the last place of slot 0 unused, those of a slot out of use poisoned."""
    indices = torch.stack([torch.randperm(N + G, generator=torch.Generator().manual_seed(t))[:C] for t in range(T)])
    indices, values = indices.sort().values, rand(T, C, K, seed=3)
    indices[0, -1], values[0, -1] = N + G, torch.nan
    indices[UNUSED], values[UNUSED] = N + G, torch.nan
    return indices, values


@per_shape
@per_index
def test_rows_linear(shape: tuple[int, ...], tenant: list[int] | None) -> None:
    y, x = rand(*shape, N), rand(*shape, K)
    indices, values = stored()

    def entry(r: int, slot: int | None) -> Tensor:
        out = F.pad(part(y, r, tenant), (0, G))
        for at, row in zip(indices[slot], values[slot], strict=True) if slot is not None else ():
            if at < N + G:
                out[..., at] = part(x, r, tenant) @ row
        return out

    check(ops.rows_linear(y, x, indices, values, index(tenant), out_features=N + G), per_entry(tenant, entry))


@per_shape
@per_index
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_embedding(shape: tuple[int, ...], tenant: list[int] | None, dtype: torch.dtype) -> None:
    ids = torch.randint(0, N + G, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = rand(*shape, K)
    indices, values = stored()

    def entry(r: int, slot: int | None) -> Tensor:
        out = part(y, r, tenant).clone()
        for at, row in zip(indices[slot], values[slot], strict=True) if slot is not None else ():
            if at < N + G:
                out[part(ids, r, tenant) == at] = row
        return out

    check(ops.rows_embedding(y, ids, indices, values, index(tenant)), per_entry(tenant, entry))


@per_shape
@per_index
def test_known_ids(shape: tuple[int, ...], tenant: list[int] | None) -> None:
    """An id of an added token becomes the base's last, one past the row's vocabulary stays an error."""
    vocabulary = torch.tensor([N, N + 9, N + G, N + 1, N])  # of four slots and the base
    ids = torch.arange(R * M).reshape(R, M).expand(R, M) if shape == (R, M) else torch.arange(N + G + 3)[: shape[0]]
    ids = ids.reshape(-1, *[1] * (len(shape) - 1)).expand(-1, *shape[1:]) if ids.dim() == 1 else ids

    def entry(r: int, slot: int | None) -> Tensor:
        mine, size = part(ids, r, tenant), vocabulary[T if slot is None else slot]
        return torch.where(mine < size, mine.clamp(max=N - 1), mine)

    found = ops.known_ids(ids, N, vocabulary, index(tenant))
    assert torch.equal(found, per_entry(tenant, entry))
    assert torch.equal(ops.known_ids(ids, N, None, index(tenant)), ids)


@pytest.mark.parametrize(("row", "token", "known"), [(0, N + 1, True), (0, N + 2, False), (1, N, False), (2, N, False)])
def test_an_id_past_a_rows_vocabulary_is_an_error(row: int, token: int, known: bool) -> None:
    """Row 0's tenant has two tokens more than the base, whatever the others have."""
    vocabulary = torch.tensor([N, N + 9, N + 2, N, N])
    ids = torch.zeros(R, M, dtype=torch.int64)
    ids[row, 1] = token
    lookup = ops.known_ids(ids, N, vocabulary, index(TENANT))
    if known:
        assert F.embedding(lookup, rand(N, K)).shape == (R, M, K)
    else:
        with pytest.raises(IndexError):
            F.embedding(lookup, rand(N, K))


@pytest.mark.parametrize("shape", [(), (K,), (2, K)])
@pytest.mark.parametrize("tenant", INDICES[:3], ids=["mixed", "base", "identical"])
def test_select(shape: tuple[int, ...], tenant: list[int]) -> None:
    small = rand(T + 1, *shape)
    small[UNUSED] = torch.nan
    expected = torch.stack([small[slot if 0 <= slot < T else T] for slot in tenant])
    check(ops.select(small, index(tenant)), expected)


@per_shape
@pytest.mark.parametrize("tenant", INDICES[:3], ids=["mixed", "base", "identical"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_select_embedding(shape: tuple[int, ...], tenant: list[int], dtype: torch.dtype) -> None:
    small = rand(T + 1, N, K)
    small[UNUSED] = torch.nan
    ids = torch.randint(0, N, shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def entry(r: int, slot: int | None) -> Tensor:
        return F.embedding(part(ids, r, tenant), small[T if slot is None else slot])

    check(ops.select_embedding(ids, small, index(tenant)), per_entry(tenant, entry))


@pytest.mark.parametrize("token", [N, N * T, -1, -N])
@pytest.mark.parametrize("row", range(R))
def test_an_id_outside_a_small_table_is_an_error(row: int, token: int) -> None:
    ids = torch.zeros(R, M, dtype=torch.int64)
    ids[row, 1] = token
    with pytest.raises(IndexError):
        ops.select_embedding(ids, rand(T + 1, N, K), index(TENANT))


def placed() -> tuple[Tensor, Tensor]:
    """Dense matrices of slots 0 and 3; entry 1 is of a slot out of use."""
    dense = rand(3, N, K, seed=4)
    dense[1] = torch.nan
    return dense, torch.tensor([2, 1, -1, 0])


@per_shape
@per_index
def test_dense_linear(shape: tuple[int, ...], tenant: list[int] | None) -> None:
    y, x = rand(*shape, N), rand(*shape, K)
    dense, place = placed()

    def entry(r: int, slot: int | None) -> Tensor:
        if slot is None or place[slot] < 0:
            return part(y, r, tenant)
        return part(x, r, tenant) @ dense[place[slot]].T

    check(ops.dense_linear(y, x, dense, place, index(tenant)), per_entry(tenant, entry))


@per_shape
@per_index
def test_dense_embedding(shape: tuple[int, ...], tenant: list[int] | None) -> None:
    y = rand(*shape, K)
    ids = torch.randint(0, N, shape, generator=torch.Generator().manual_seed(1))
    dense, place = placed()

    def entry(r: int, slot: int | None) -> Tensor:
        if slot is None or place[slot] < 0:
            return part(y, r, tenant)
        return F.embedding(part(ids, r, tenant), dense[place[slot]])

    check(ops.dense_embedding(y, ids, dense, place, index(tenant)), per_entry(tenant, entry))


def test_dense_embedding_beside_a_grown_table() -> None:
    """Another tenant's added token lies past the dense tables."""
    y, ids = rand(2, K), torch.tensor([N + 5, N - 1])
    found = ops.dense_embedding(y, ids, rand(1, N, K), torch.tensor([-1, 0]), index([0, 1]))
    check(found, torch.stack([y[0], rand(1, N, K)[0, N - 1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@per_shape
@per_index
def test_mask_vocabulary(shape: tuple[int, ...], tenant: list[int] | None, dtype: torch.dtype) -> None:
    logits, vocabulary = rand(*shape, N + G).to(dtype), torch.tensor([N + 1, 0, N + G, N, N])

    def entry(r: int, slot: int | None) -> Tensor:
        out = part(logits, r, tenant).clone()
        out[..., vocabulary[T if slot is None else slot] :] = -torch.inf
        return out

    assert torch.equal(ops.mask_vocabulary(logits, vocabulary, index(tenant)), per_entry(tenant, entry))


@pytest.mark.parametrize("shape", [(), (K,), (M, K)])
def test_over_rows(shape: tuple[int, ...]) -> None:
    value = rand(*shape, 2)
    assert torch.equal(ops.over_rows(value, index(TENANT)), torch.stack([value] * R))


ALONG: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((K,), (R, M, K), 0),
    ((), (R, M, K), 0),
    ((M, 1), (R, M, K), 0),
    ((1, M, K), (R, M, K), 0),
    ((K,), (R * M, K), 0),
    ((1, K), (R * M, K), 0),
    ((K,), (M, R, K), 1),
    ((M, 1, K), (M, R, K), 1),
    ((M, 1, 1), (M, K, R * 2), 2),
    ((M, K), (R, K), 0),
]


@pytest.mark.parametrize(("shape", "like", "dim"), ALONG)
def test_along_rows(shape: tuple[int, ...], like: tuple[int, ...], dim: int) -> None:
    value, other = rand(R, *shape), rand(*like)
    if (shape, like) == ((M, K), (R, K)):  # the parameter brings a dimension that the operand has not: [M, R, K]
        with pytest.raises(ValueError, match="no place for rows"):
            ops.along_rows(value, other, dim, 2)
        return
    rank = max(len(shape), len(like))
    found = other + ops.along_rows(value, other, dim, rank)
    expected = torch.cat([own + value[r].reshape(shape) for r, own in enumerate(other.chunk(R, dim))], dim)
    check(found, expected)


@pytest.mark.parametrize("shape", [(R,), (R, M), (R * M,), (R, 1, M)])
def test_matmul_rows(shape: tuple[int, ...]) -> None:
    x, weight = rand(*shape, K), rand(R, K, N)
    expected = torch.cat([own @ weight[r] for r, own in enumerate(x.chunk(R))])
    check(ops.matmul_rows(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine(dtype: torch.dtype) -> None:
    y, x, weight, bias = (
        rand(R, M, K),
        rand(R, M, K).to(dtype),
        rand(R, 1, K).to(dtype),
        rand(R, 1, K, seed=2).to(dtype),
    )
    check(ops.affine(y, x, weight, bias), (y * weight.float() + bias.float()).to(dtype))
    check(ops.affine(y, x, weight, None), (y * weight.float()).to(dtype))
    check(ops.affine(y, x, None, bias), (y + bias.float()).to(dtype))


def test_a_row_does_not_depend_on_the_other_entries() -> None:
    x, y, (indices, values), (dense, place) = rand(R, M, K), rand(R, M, N), stored(), placed()
    calls: list[Callable[[Tensor | None], Tensor]] = [
        lambda tenant: ops.rows_linear(y, x, indices, values.nan_to_num(), tenant, out_features=N + G),
        lambda tenant: ops.dense_linear(y, x, dense, place, tenant),
        lambda tenant: ops.matmul_rows(x, ops.select(rand(T + 1, K, N), tenant)),
    ]
    for call in calls:
        found = call(index(TENANT))
        for r, slot in enumerate(TENANT):
            others = [0, 3, 2, -1]
            others[r] = slot
            assert torch.equal(call(index(others))[r], found[r])


@pytest.mark.parametrize("call", [
    lambda: ops.mask_vocabulary(rand(3, N), torch.tensor([N] * 5), index(TENANT)),
    lambda: ops.rows_linear(rand(6, N), rand(6, K), *stored(), index(TENANT), out_features=N + G),
    lambda: ops.select_embedding(torch.zeros(6, dtype=torch.int64), rand(T + 1, N, K), index(TENANT)),
])  # fmt: skip
def test_rows_that_the_entries_do_not_divide(call: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError):
        call()
