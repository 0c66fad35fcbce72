"""Packages for a GPU hold every kernel that their C++ launches, and launch it as it was compiled."""

from __future__ import annotations

import functools
import importlib

import pytest

pytest.importorskip("triton")
ahead_of_time = pytest.importorskip("ahead_of_time")
problems = pytest.importorskip("problems")
parse = importlib.import_module("measured.ptx.text").parse


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_what_a_package_holds(name, tmp_path):
    made, _ = problems.generate(problems.PROBLEMS[name], how=functools.partial(ahead_of_time.package, tmp_path))
    assert made.launches
    assert "proxy_executor_call" not in made.code, "an op that a machine without this package does not know"
    for launch in made.launches.values():
        assert launch.file in made.files
        assert launch.file.read_bytes() == launch.compiled.asm["cubin"]
        assert launch.name.encode() in launch.compiled.asm["cubin"]
        assert launch.arguments == len(parse(launch.compiled.asm["ptx"]).parameters)
        assert (launch.warps, launch.shared) == (launch.compiled.metadata.num_warps, launch.compiled.metadata.shared)
