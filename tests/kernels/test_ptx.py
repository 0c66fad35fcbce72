"""The PTX machine itself: what a GPU would refuse, or answer differently from time to time, is an error here."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

launch = importlib.import_module("measured.ptx.launch")
memory = importlib.import_module("measured.ptx.memory")
Fault = memory.Fault

THREADS = 64


def written(body: str) -> SimpleNamespace:
    """A kernel of two pointers, in PTX, as Triton gives one; `%rd1`, `%rd2`: they, `%r1`: the thread."""
    text = f"""
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid {THREADS}
{{
	.reg .b32 %r<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	ld.param.b64 %rd2, [kernel_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	shl.b32 %r2, %r1, 2;
	{body}
	ret;
}}
"""
    return SimpleNamespace(
        asm={"ptx": text}, src=SimpleNamespace(constants={}), metadata=SimpleNamespace(shared=4 * THREADS)
    )


def run(body: str, *, count: bool = False):
    """`y` after a launch with x = 0, 1, 2, ...; with `count` the machine too."""
    x, y = torch.arange(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    (machine,) = launch.execute(written(body), [x, y], (1,), count=count)
    return (y, machine) if count else y


def test_threads_that_branch_apart_meet_again():
    """Each counts down from its own number, and all are together at the sum over their warp."""
    found = run("""
	ld.global.b32 %r3, [%rd4];
	mov.b32 %r4, 0;
$L__again:
	setp.eq.s32 %p1, %r3, 0;
	@%p1 bra $L__done;
	add.s32 %r3, %r3, -1;
	add.s32 %r4, %r4, 2;
	bra.uni $L__again;
$L__done:
	redux.sync.add.s32 %r5, %r4, -1;
	st.global.b32 [%rd5], %r5;
""")
    assert found.tolist() == [31 * 32] * 32 + [31 * 32 + 32 * 64] * 32


SWAPPED = """
	ld.global.b32 %r3, [%rd4];
	st.shared.b32 [%r2], %r3;
	{barrier}
	xor.b32 %r4, %r2, {distance};
	ld.shared.b32 %r5, [%r4];
	st.global.b32 [%rd5], %r5;
"""


def test_a_barrier_between_warps_is_needed():
    there = torch.arange(THREADS, dtype=torch.int32)
    assert torch.equal(run(SWAPPED.format(barrier="bar.sync 0;", distance=128)), there ^ 32)
    assert torch.equal(run(SWAPPED.format(barrier="", distance=4)), there ^ 1)  # within a warp
    with pytest.raises(Fault, match=r"reads from shared memory what another wrote.*ld\.shared\.b32 %r5"):
        run(SWAPPED.format(barrier="", distance=128))
    with pytest.raises(Fault, match="writes to shared memory what another wrote or read"):
        run(SWAPPED.format(barrier="bar.sync 0;", distance=128) + "st.shared.b32 [%r2], %r2;")


def test_a_barrier_that_some_threads_miss():
    with pytest.raises(Fault, match="by some of a block's threads only"):
        run("setp.lt.u32 %p1, %r1, 32; @%p1 bra $L__over; bar.sync 0;\n$L__over:\nmov.b32 %r3, 1;")
    with pytest.raises(Fault, match="threads are not together"):
        run("setp.lt.u32 %p1, %r1, 7; @%p1 bra $L__over; redux.sync.add.s32 %r3, %r1, -1;\n$L__over:\nmov.b32 %r4, 1;")


WAIT = "cp.async.wait_group 0;"


def copied(wait, size="", where="%r2"):
    return f"""
	cp.async.ca.shared.global [{where}], [%rd4], 0x4{size};
	cp.async.commit_group;
	{wait}
	ld.shared.b32 %r3, [%r2];
	st.global.b32 [%rd5], %r3;
"""


def test_what_is_copied_is_there_once_it_was_waited_for():
    there = torch.arange(THREADS, dtype=torch.int32)
    assert torch.equal(run(copied(WAIT)), there)
    assert not run("mov.b32 %r6, 0;" + copied(WAIT, size=", %r6")).any()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (copied("cp.async.wait_group 1;"), "a copy under way writes to: ld"),
        (copied("bar.sync 0;"), "a copy under way writes to: ld"),
        ("mov.b32 %r6, 0; setp.lt.u32 %p1, %r1, 2; @%p1 " + copied(WAIT, where="%r6"), "copy different values"),
        ("add.s32 %r2, %r2, 4;" + copied(WAIT), "outside of the block's shared memory"),
    ],
)
def test_copies_that_may_or_may_not_have_happened(body, message):
    with pytest.raises(Fault, match=message):
        run(body)


def test_groups_of_copies_are_each_threads_own():
    """A warp that waits for one of its two groups has what it copied first; the other warp never waits."""
    there = torch.arange(THREADS, dtype=torch.int32)
    found = run("""
	setp.lt.u32 %p1, %r1, 32;
	cp.async.ca.shared.global [%r2], [%rd4], 0x4;
	cp.async.commit_group;
	@%p1 cp.async.commit_group;
	@%p1 cp.async.wait_group 1;
	@%p1 ld.shared.b32 %r3, [%r2];
	@%p1 st.global.b32 [%rd5], %r3;
""")
    assert torch.equal(found, torch.where(there < 32, there, 0))


def test_what_a_matrix_instruction_reads_is_left_alone_until_it_was_waited_for():
    shared = memory.SharedMemory(256, 1, 128, False)
    places, threads = np.arange(0, 256, 16), np.zeros(16, np.int64)
    shared.read_until_waited_for(places, threads, 16)
    everyone = np.arange(128)
    shared.reads.commit(everyone)
    shared.barrier(None)
    for thread in (0, 40):
        with pytest.raises(Fault, match="matrix instruction under way"):
            shared.store(np.array([8]), np.array([thread]), np.ones((1, 1), np.uint32))
    shared.wait_for_reads(everyone, 1)
    with pytest.raises(Fault, match="matrix instruction under way"):
        shared.store(np.array([8]), np.array([0]), np.ones((1, 1), np.uint32))
    shared.wait_for_reads(everyone, 0)
    shared.store(np.array([8]), np.array([0]), np.ones((1, 1), np.uint32))
    with pytest.raises(Fault, match="what another wrote"):
        shared.read_until_waited_for(places, threads, 16)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mov.b32 %r3, -8; shr.s32 %r4, %r3, 40;", -1),
        ("mov.b32 %r3, -8; shr.u32 %r4, %r3, 40;", 0),
        ("mov.b32 %r3, -7; div.s32 %r4, %r3, 2;", -3),
        ("mov.b32 %r3, -7; rem.s32 %r4, %r3, 2;", -1),
        ("mov.b32 %r3, -1; mul.hi.u32 %r4, %r3, 16;", 15),
        ("mov.b32 %r3, -1; mul.wide.s32 %rd6, %r3, 16; cvt.u32.u64 %r4, %rd6;", -16),
        ("mov.b32 %r3, -1; mul.wide.u32 %rd6, %r3, 16; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 %r4, %rd6;", 15),
        ("mov.b32 %r3, 0xF0; bfe.s32 %r4, %r3, 4, 4;", -1),
        ("mov.b32 %r3, 0xF0; bfe.u32 %r4, %r3, 4, 4;", 15),
        ("mov.b32 %r3, 0xCC; lop3.b32 %r4, %r3, 0xAA, 0xF0, 0x6A;", ((0xCC & 0xAA) ^ 0xF0)),
        ("mov.b32 %r3, 0x44332211; prmt.b32 %r4, %r3, 0x88776655, 0x7043;", 0x88115544 - 2**32),
        ("mov.b32 %r3, 300; cvt.s8.s32 %rs1, %r3; cvt.s32.s16 %r4, %rs1;", 44),
        ("mov.b32 %r3, 0f7FC00000; max.f32 %r4, %r3, 0f3F800000;", 0x3F800000),
        ("mov.b32 %r3, 0f7FC00000; setp.gtu.f32 %p1, %r3, 0f3F800000; selp.b32 %r4, 1, 2, %p1;", 1),
        ("mov.b32 %r3, 0f7FC00000; setp.gt.f32 %p1, %r3, 0f3F800000; selp.b32 %r4, 1, 2, %p1;", 2),
        ("mov.b32 %r3, 0fC0200000; cvt.rzi.s32.f32 %r4, %r3;", -2),
        ("mov.b32 %r3, 0fC0200000; cvt.rmi.ftz.f32.f32 %r4, %r3; cvt.rzi.s32.f32 %r4, %r4;", -3),
        ("mov.b32 %r3, 0f3F808000; cvt.rn.bf16.f32 %rs1, %r3; cvt.u32.u16 %r4, %rs1;", 0x3F80),  # to even
        ("mov.b32 %r3, 0f3F818000; cvt.rn.bf16.f32 %rs1, %r3; cvt.u32.u16 %r4, %rs1;", 0x3F82),
        ("mov.b32 %r3, 0xBF80C000; abs.bf16x2 %r4, %r3;", 0x3F804000),
    ],
)
def test_arithmetic(body, expected):
    assert run(body + "st.global.b32 [%rd5], %r4;").tolist() == [expected] * THREADS


@pytest.mark.parametrize(
    "body",
    [
        "add.sat.f32 %r3, %r1, %r1;",
        "mad.hi.u32 %r3, %r1, %r1, %r1;",
        "cvt.rz.bf16.f32 %rs1, %r1;",
        "setp.lt.bf16 %p1, %rs1, %rs1;",
        "bar.sync 1, 32;",
        "bar.red.or.pred %p1, 0, %p1;",
        "redux.sync.xor.b32 %r3, %r1, -1;",
        "cp.async.wait_all;",
        "mov.u32 %r3, %lanemask_lt;",
        "st.shared.b8 [%r2], %r1;",
        "bfe.u32 %r3, %r1, 30, 8;",
    ],
)
def test_what_is_not_known_is_refused(body):
    with pytest.raises(NotImplementedError):
        run(body)
    run("mov.pred %p9, 0; @%p9 bra $L__never; bra.uni $L__over;\n$L__never:\n" + body + "\n$L__over:\nmov.b32 %r3, 1;")


@pytest.mark.parametrize(
    ("body", "sectors", "conflicts"),
    [
        ("ld.global.b32 %r3, [%rd4];", 8, 0),
        ("ld.global.b32 %r3, [%rd1];", 2, 0),  # one sector for each warp
        (
            "and.b32 %r3, %r1, 1; mul.wide.u32 %rd6, %r3, 128; add.s64 %rd6, %rd1, %rd6; ld.global.b32 %r3, [%rd6];",
            4,
            0,
        ),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 ld.global.b32 %r3, [%rd4];", 1, 0),
        ("st.shared.b32 [%r2], %r1;", 0, 0),
        ("and.b32 %r3, %r1, 1; shl.b32 %r3, %r3, 7; ld.shared.b32 %r4, [%r3];", 0, 2),  # two words of one bank
        ("mov.b32 %r3, 0; ld.shared.b32 %r4, [%r3];", 0, 0),
    ],
)
def test_traffic_is_counted(body, sectors, conflicts):
    _, machine = run(body, count=True)
    assert sum(machine.memory.sectors.values()) == sectors
    assert machine.shared.conflicts == conflicts


def test_executed_threads_are_counted():
    _, machine = run("setp.lt.u32 %p1, %r1, 7; @%p1 add.s32 %r3, %r1, 1; add.s32 %r3, %r1, 1;", count=True)
    assert machine.executed[-3:-1] == [7, THREADS]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r3, [%rd4+4];", "in none of the tensors"),
        ("ld.global.b32 %r3, [%rd4+-4];", "in none of the tensors"),
        ("st.global.b32 [%rd4+65536], %r1;", "in none of the tensors"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd4];", "not a multiple of the 8 bytes"),
        ("st.global.b32 [%rd2], %r1;", "different values at one address"),
        (
            "and.b32 %r3, %r2, 124; ld.shared.v2.b32 {%r3, %r4}, [%r3];",
            "in shared memory is not a multiple of",
        ),
        ("st.shared.b32 [%r2+4], %r1;", "outside of the block's shared memory"),
        ("mov.b32 %r3, 0; st.shared.b32 [%r3], %r1;", "different values at one place"),
        ("ld.global.b32 %r3, [%rd9];", "not a multiple|in none of the tensors"),
    ],
)
def test_stray_accesses(body, message):
    with pytest.raises(Fault, match=message):
        run(body)


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"does not know tcgen05\.cp %r1"):
        run("tcgen05.cp %r1;")


@triton.jit
def softmax(x_ptr, y_ptr, n, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * n + at, mask=at < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + tl.program_id(0) * n + at, e / tl.sum(e, 0), mask=at < n)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] + n[None, :] * K)
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@pytest.mark.parametrize("target", [80, 90, 120])
def test_kernels_that_are_not_ours(target):
    x = torch.randn(3, 300)
    y = torch.empty_like(x)
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    c = torch.empty(64, 32)
    with launch.launches(target):
        softmax[3,](x, y, 300, N=512)
        product[1,](a, b, c, M=64, N=32, K=64)
    torch.testing.assert_close(y, x.softmax(-1))
    torch.testing.assert_close(c, a.float() @ b.float().T)


def test_blocks_may_run_in_any_order():
    x = torch.randn(5, 40)
    y = torch.empty_like(x)
    with launch.launches(90, together=2):
        softmax[5,](x, y, 40, N=64)
    torch.testing.assert_close(y, x.softmax(-1))


@pytest.mark.parametrize("together", [1, 3])
def test_whichever_program_comes_last_adds_up_the_same(together):
    from bitdelta_compile.kernels import configs, fused, layout
    from bitdelta_compile.kernels.testing import random_bank

    signs, row_scale, *_ = random_bank(2, 1, 70, 700)
    packed = layout.to_layout(signs, 700, layout.FRAGMENTS)
    x, weight, bias = (torch.randn(size).bfloat16() for size in ((3, 700), (70, 700), (70,)))
    tenant = torch.tensor([1, -1, 0], dtype=torch.int32)
    plan = configs.Plan(configs.FUSED_DECODE[0])
    found = []
    for blocks in (None, together):
        with launch.launches(90, together=blocks):
            found.append(fused.base_delta_linear(x, weight, bias, packed, row_scale, None, None, None, tenant, plan))
    assert torch.equal(*found)


def test_without_its_barriers_a_kernel_of_triton_is_refused():
    x = torch.randn(1, 300)
    with launch.launches(90):
        compiled = softmax.run(x, torch.empty_like(x), 300, N=512, grid=(1,), warmup=True)
    changed = SimpleNamespace(
        asm={"ptx": re.sub(r"bar\.sync\s+0;", "", compiled.asm["ptx"])}, src=compiled.src, metadata=compiled.metadata
    )
    assert changed.asm["ptx"] != compiled.asm["ptx"]
    with pytest.raises(Fault, match="without a barrier in between"):
        launch.execute(changed, [x, torch.empty_like(x), 300, 512], (1,))
