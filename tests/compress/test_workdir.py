"""Interrupted anywhere, a compression goes on where it was and gives the same file."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitdelta_compile.compress import compress
from bitdelta_compile.errors import UnsupportedError

TEXTS = ["the value of python", "language is not a value", "it is in the language and not in python", "a b c the of"]


class Interrupted(Exception):
    pass


def saved(pair, folder: Path, name: str, **options) -> bytes:
    compress(pair.base, pair.tuned, TEXTS, tokens=200, **options).save(folder / name)
    return (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["llama_pair", "bert_pair"])  # the second has biases that are fitted too
def test_an_interrupted_run_goes_on_where_it_was(name, request, tmp_path):
    pair = request.getfixturevalue(name)
    expected = saved(pair, tmp_path, "whole")
    fitted = []

    def stop_at(step):
        def report(stage, done, total):
            fitted.append(done)
            if done == step:
                raise Interrupted

        return report

    work = tmp_path / "work"
    for step in (3, 4, 9):
        with pytest.raises(Interrupted):
            saved(pair, tmp_path, "part", work_dir=work, progress=stop_at(step))
    stored = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert len(stored) >= 8
    assert saved(pair, tmp_path, "resumed", work_dir=work) == expected
    after = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert stored.items() <= after.items()
    assert saved(pair, tmp_path, "again", work_dir=work) == expected


RUN = """
import os, signal, sys, torch
from bitdelta_compile.compress import compress
torch.set_num_threads(1)
def report(stage, done, total):
    if (stage, done) == (sys.argv[4], int(sys.argv[5])):
        os.kill(os.getpid(), signal.SIGKILL)
compress(sys.argv[1], sys.argv[2], tokens=300, work_dir=sys.argv[3], progress=report)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed(llama_pair, tmp_path):
    """Between two matrices, and (below) when nothing but sampled tokens is kept."""
    work = tmp_path / "work"
    compress(llama_pair.base, llama_pair.tuned, tokens=300).save(tmp_path / "whole")
    command = [sys.executable, "-c", RUN, str(llama_pair.base), str(llama_pair.tuned), str(work), "fit", "6"]
    process = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(list(work.glob("*.safetensors"))) >= 6
    compress(llama_pair.base, llama_pair.tuned, tokens=300, work_dir=work).save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    for path in work.iterdir():
        if not path.name.startswith("sampled-"):
            path.unlink()
    compress(llama_pair.base, llama_pair.tuned, tokens=300, work_dir=work).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("change", [{"planes": 2}, {"seed": 4}, {"quality": "balanced"}])
def test_the_work_of_another_task_is_refused(bert_pair, tmp_path, change):
    work = tmp_path / "work"
    saved(bert_pair, tmp_path, "one", work_dir=work)
    with pytest.raises(UnsupportedError, match="another compression"):
        saved(bert_pair, tmp_path, "two", work_dir=work, **change)


def test_another_fine_tune_is_refused(bert_pair, tmp_path):
    work = tmp_path / "work"
    saved(bert_pair, tmp_path, "one", work_dir=work)
    with pytest.raises(UnsupportedError, match="its tuned"):
        compress(bert_pair.base, bert_pair.base, TEXTS, tokens=200, work_dir=work)


def test_a_folder_of_something_else_is_refused(bert_pair, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="something else"):
        saved(bert_pair, tmp_path, "one", work_dir=tmp_path)


def test_a_damaged_file_is_named(bert_pair, tmp_path):
    work = tmp_path / "work"
    saved(bert_pair, tmp_path, "one", work_dir=work)
    path = next(path for path in work.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnsupportedError, match="delete it"):
        saved(bert_pair, tmp_path, "two", work_dir=work)
