"""The embedding's delta on a GPU: part of the loop that looks up the base's rows, and right as PTX."""

from __future__ import annotations

import pytest
import torch
from bitdelta_compile.kernels import reference
from bitdelta_compile.kernels.layout import FRAGMENTS
from bitdelta_compile.lowering import inductor, ops

pytest.importorskip("triton")
without_gpu = pytest.importorskip("without_gpu")
problems = pytest.importorskip("problems")


@pytest.mark.parametrize(
    ("planes", "vocabulary", "features", "column", "rank"), [(1, 50, 384, False, 0), (2, 33, 300, True, 2)]
)
def test_one_loop_for_base_and_delta(planes, vocabulary, features, column, rank):
    canonical, signs = problems.bank(3, planes, vocabulary, features, column=column, rank=rank)
    given = [tensor for tensor in (signs, *canonical[1:]) if tensor is not None]
    names = ["signs", "row_scale", *["col_scale"] * column, *["left", "right"] * (rank > 0)]

    def look_up(ids, tenant, table, *stacked):
        parts = dict(zip(names, stacked, strict=True))
        own = [parts.get(name) for name in ("signs", "row_scale", "col_scale", "left", "right")]
        delta = ops.delta_embedding(
            ids, *own, tenant, embedding_dim=features, dtype=torch.bfloat16, layout=FRAGMENTS
        )  # fmt: skip
        return torch.nn.functional.embedding(ids, table) + delta

    arguments = ", ".join(f"a{place}" for place in range(len(given)))
    scope = {"look_up": look_up}
    exec(f"def traced(ids, tenant, table, {arguments}):\n    return look_up(ids, tenant, table, {arguments})", scope)
    ids = torch.randint(0, vocabulary, (4, 7), generator=torch.Generator().manual_seed(0))
    tenant, table = problems.index(2, -1, 7, 0), torch.randn(vocabulary, features).bfloat16()
    code = without_gpu.generated(scope["traced"], (ids, tenant, table, *given), inductor.compile_graph)
    assert len(without_gpu.kernels(code)) == 1
    (found,) = without_gpu.run(code, [ids, tenant, table, *given], 90)
    expected = table[ids].double() + reference.delta_embedding(
        ids, *canonical, tenant, embedding_dim=features, dtype=torch.float64
    )
    assert (found.double() - expected).norm() / expected.norm() < 1e-2
    assert torch.equal(found[1], table[ids[1]])
