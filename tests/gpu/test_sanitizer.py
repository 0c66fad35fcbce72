"""The eager kernels under compute-sanitizer, where it is installed: no access out of bounds or unaligned."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLED = sorted(str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
SANITIZER = shutil.which("compute-sanitizer") or next(reversed(INSTALLED), None)
EVERY_KERNEL = """
import torch
from bitdelta_compile.kernels import configs, delta_embedding, delta_linear, fused, layout

def bank(slots, planes, outputs, features):
    signs = layout.pack(torch.rand(slots, planes, outputs, features) < 0.5).cuda()
    scales = torch.rand(slots, planes, outputs).cuda(), torch.rand(slots, planes, features).cuda()
    left, right = torch.randn(slots, outputs, 3).bfloat16().cuda(), torch.randn(slots, 3, features).bfloat16().cuda()
    return layout.to_layout(signs, features, layout.FRAGMENTS), *scales, left, right

for rows, outputs, features in ((3, 33, 300), (5, 16, 640), (90, 65, 384)):
    tensors = bank(3, 2, outputs, features)
    tenant = (torch.arange(rows) % 4 - 1).int().cuda()
    x = torch.randn(rows, features).cuda()
    weight = torch.randn(outputs, features).cuda()
    for exact in (False, True):
        facts = {"column": True, "exact": exact}
        arch = configs.architecture(x.device)
        plan = configs.choose(arch, rows, 3, outputs, features, x.dtype, **facts)
        assert delta_linear.delta_linear(x, *tensors, tenant, plan).isfinite().all()
        plan = configs.choose_fused(arch, rows, 3, outputs, features, x.dtype, **facts)
        if plan is not None:
            assert fused.base_delta_linear(x, weight, None, *tensors, tenant, plan).isfinite().all()
    ids = torch.randint(outputs, (rows,)).cuda()
    assert delta_embedding.delta_embedding(ids, *tensors, tenant, features, torch.float32).isfinite().all()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
def test_no_kernel_leaves_its_tensors():
    assert SANITIZER is not None
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", EVERY_KERNEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
