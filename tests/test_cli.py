"""Every command on tiny real checkpoints: what it writes, what it prints, how it exits."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitdelta_compile.lowering.torch_internals import Compiled
from typer.testing import CliRunner, Result

from bitdelta_compile import demo, doctor, fidelity, materials
from bitdelta_compile.cli import app
from bitdelta_compile.delta import Delta
from bitdelta_compile.demo import package as demo_package
from bitdelta_compile.demo import rows as demo_rows
from bitdelta_compile.demo import tenants as demo_tenants
from bitdelta_compile.errors import DeltaFileError
from bitdelta_compile.progress import Progress


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    logger = logging.getLogger("bitdelta_compile")
    before = logger.handlers, logger.level
    yield
    logger.handlers, logger.level = before


def bitdelta(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = bitdelta(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    """The one sentence that a refused command leaves."""
    result = bitdelta(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture(scope="module")
def delta_file(bert_pair, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    file = tmp_path_factory.mktemp("delta") / "tuned.bitdelta.safetensors"
    succeed("compress", bert_pair.base, bert_pair.tuned, "-o", file, "--tokens", 256)
    return file


def test_compress_writes_a_delta_and_says_how_small(bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "x.bitdelta.safetensors"
    shown = succeed("compress", bert_pair.base, bert_pair.tuned, "-o", file, "--tokens", 256)
    assert f"wrote {file}" in shown
    assert "sign" in {encoding.kind for encoding in Delta.load(file).encodings.values()}


@pytest.mark.parametrize("options", [["--planes", "2"], ["--method", "mean_abs"], ["--rank", "1"]])
def test_compress_passes_its_options_on(options: list[str], bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "x.bitdelta.safetensors"
    found = json.loads(
        succeed("compress", bert_pair.base, bert_pair.tuned, "-o", file, "--tokens", 256, *options, "--json")
    )
    name, value = options
    assert str(found["options"][name.removeprefix("--")]) == value
    assert found["file_bytes"] == file.stat().st_size
    assert found["factor"] == pytest.approx(found["tuned_bytes"] / found["file_bytes"])


def test_compress_with_text(bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text, file = tmp_path / "text.txt", tmp_path / "x.bitdelta.safetensors"
    text.write_text("the language of python\n\na value in the language\n" * 20)
    succeed("compress", bert_pair.base, bert_pair.tuned, "-o", file, "--text", text)
    assert file.exists()


def test_checkpoints_that_are_no_weights(delta_file: Path, bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, content in (("pointer", b"version https://git-lfs.github.com/spec/v1\n"), ("cut", None)):
        folder = tmp_path / name
        shutil.copytree(bert_pair.base, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000] if content is None else content)
        assert str(folder) in refuse("verify", delta_file, bert_pair.base, folder)
        assert str(folder) in refuse("export", folder, delta_file, "-o", tmp_path / "x.pt2")


def test_the_folder_one_is_in_is_not_replaced(delta_file: Path, bert_pair, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert "name another" in refuse("materialize", bert_pair.base, delta_file, "-o", ".")
    assert not list(tmp_path.iterdir())


def test_compress_replaces_a_file_only_when_forced(bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "x.bitdelta.safetensors"
    file.write_text("precious")
    assert "--force" in refuse("compress", bert_pair.base, bert_pair.tuned, "-o", file)
    nowhere = file.parent / "none" / "delta"
    assert "no folder" in refuse("compress", bert_pair.base, bert_pair.tuned, "-o", nowhere)
    assert "is a folder" in refuse("compress", bert_pair.base, bert_pair.tuned, "-o", tmp_path, "--force")
    assert file.read_text() == "precious"
    succeed("compress", bert_pair.base, bert_pair.tuned, "-o", file, "--method", "mean_abs", "--force")
    Delta.load(file)


def test_inspect(delta_file: Path) -> None:
    assert "sign" in succeed("inspect", delta_file)
    shown = succeed("inspect", delta_file, "--params")
    assert "embeddings.word_embeddings.weight" in shown
    assert "[64, 64]" in shown


def test_inspect_json(delta_file: Path) -> None:
    found = json.loads(succeed("inspect", delta_file, "--json", "--params"))
    parameters = found["parameters"]
    assert sum(found["encodings"].values()) == len(parameters)
    assert found["tensor_bytes"] < found["file_bytes"] < found["tuned_bytes"]
    assert parameters["embeddings.word_embeddings.weight"]["shape"] == [64, 64]
    assert "config.json" in found["side_files"]
    assert "parameters" not in json.loads(succeed("inspect", delta_file, "--json"))


def test_verify(delta_file: Path, bert_pair) -> None:  # type: ignore[no-untyped-def]
    found = json.loads(succeed("verify", delta_file, bert_pair.base, bert_pair.tuned, "--json"))
    assert found["kind"] == "encoder"
    assert found["base"] < found["compressed"] <= 1
    assert found["recovered"] == pytest.approx(1 - (1 - found["compressed"]) / (1 - found["base"]))
    assert found["passed"] is True
    assert found["beside"]["name"] == "rank correlation"
    assert len(found["layers"]) == 3
    assert all(0 < lost < 1 for lost in found["layers"])
    shown = succeed("verify", delta_file, bert_pair.base, bert_pair.tuned)
    assert "recovered" in shown
    assert "rank correlation" in shown
    assert "embedding" not in shown
    assert "embedding" in succeed("verify", delta_file, bert_pair.base, bert_pair.tuned, "--layers")


def test_verify_of_a_language_model(llama_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, text = tmp_path / "x.bitdelta.safetensors", tmp_path / "text.txt"
    text.write_text("the language of python\n\na value in the language\n")
    succeed("compress", llama_pair.base, llama_pair.tuned, "-o", file, "--tokens", 256)
    found = json.loads(succeed("verify", file, llama_pair.base, llama_pair.tuned, "--text", text, "--json"))
    assert found["kind"] == "language model"
    assert found["recovered"] > 0.5
    assert found["beside"]["name"] == "perplexity"
    shown = succeed("verify", file, llama_pair.base, llama_pair.tuned, "--text", text)
    assert f"{found['beside']['tuned']:.6f}" in shown


def test_compress_within_a_budget(bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "x.bitdelta.safetensors"
    arguments = ("compress", bert_pair.base, bert_pair.tuned, "-o", file, "--tokens", 256)
    found = json.loads(succeed(*arguments, "--max-bytes", 60_000, "--json"))
    assert 50_000 < found["file_bytes"] <= 60_000
    message = refuse(*arguments, "--bits", "0.01", "--force")
    assert "the smallest takes" in message
    assert "give one of them" in refuse(*arguments, "--bits", "2", "--distill", 3, "--force")


def test_compress_and_distill(llama_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, text = tmp_path / "x.bitdelta.safetensors", tmp_path / "text.txt"
    text.write_text("the language of python is a value\n\na value in the language\n" * 3)
    options = ("--method", "mean_abs", "--text", text, "--distill", 2)
    found = json.loads(succeed("compress", llama_pair.base, llama_pair.tuned, "-o", file, *options, "--json"))
    assert "steps 2," in found["options"]["distilled"]


def test_verify_fails_below_the_share_asked_for(delta_file: Path, bert_pair) -> None:  # type: ignore[no-untyped-def]
    result = bitdelta("verify", delta_file, bert_pair.base, bert_pair.tuned, "--min-recovered", "1.1", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False


def test_materialize_gives_a_checkpoint_that_loads(delta_file: Path, bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "restored"
    succeed("materialize", bert_pair.base, delta_file, "-o", folder)
    restored = transformers.AutoModel.from_pretrained(folder).state_dict()
    expected = dict(Delta.load(delta_file).materialize(bert_pair.base))
    assert expected
    for name, tensor in expected.items():
        torch.testing.assert_close(restored[name], tensor)
    assert "empty" in refuse("materialize", bert_pair.base, delta_file, "-o", folder)


def test_materialize_in_another_dtype(delta_file: Path, bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "restored"
    succeed("materialize", bert_pair.base, delta_file, "-o", folder, "--dtype", "bfloat16")
    assert transformers.AutoModel.from_pretrained(folder).dtype == torch.bfloat16


def test_import_bitdelta(llama_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    diff, file = tmp_path / "diff.pt", tmp_path / "x.bitdelta.safetensors"
    module = "model.layers.0.mlp.up_proj"
    torch.save({f"{module}.mask": torch.zeros(2, 96, dtype=torch.int32), f"{module}.coeff": torch.tensor(0.5)}, diff)
    found = json.loads(succeed("import-bitdelta", diff, llama_pair.base, "-o", file, "--json"))
    assert found["encodings"]["sign"] == 1
    folder = tmp_path / "restored"
    succeed("materialize", llama_pair.base, file, "-o", folder)
    base, tuned = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (llama_pair.base, folder))
    changed = tuned.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(changed, torch.full((96, 64), -0.5))


def test_export_and_run(delta_file: Path, bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "tenants.pt2"
    export = ["export", bert_pair.base, delta_file, f"again={delta_file}", "-o", file, "--max-batch", 8]
    found = json.loads(succeed(*export, "--max-tokens", 16, "--json"))
    assert json.loads(found["metadata"]["bitdelta.tenants"]) == ["tuned", "again"]
    assert "--force" in refuse(*export)

    texts = ["the language of python", "a value"]
    rows = [argument for text in texts for argument in ("--text", text)]
    ran = json.loads(succeed("run", file, *rows, "--tenant", "tuned", "--tenant", "again", "--json"))["rows"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_pair.base)
    base = transformers.AutoModel.from_pretrained(bert_pair.base).eval()
    tuned = transformers.AutoModel.from_pretrained(bert_pair.base).eval()
    tuned.load_state_dict(dict(Delta.load(delta_file).materialize(bert_pair.base)), strict=False)
    for text, row in zip(texts, ran, strict=True):
        with torch.no_grad():
            expected, plain = (
                model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for model in (tuned, base)
            )
        assert (torch.tensor(row["embedding"]) - expected).norm() < 1e-3 * (expected - plain).norm()
    ids = ",".join(map(str, tokenizer(texts[0])["input_ids"]))
    assert "tuned: embedding" in succeed("run", file, "--ids", ids, "--tenant", "tuned")
    assert "base: embedding" in succeed("run", file, "--text", texts[0])

    assert "no tenant 'x'" in refuse("run", file, "--ids", ids, "--tenant", "x")
    assert "2 tenants for 1 rows" in refuse("run", file, "--ids", ids, "--tenant", "tuned", "--tenant", "again")
    assert "--text or as --ids" in refuse("run", file)
    assert "not a list of token ids" in refuse("run", file, "--ids", "one,two")
    assert "17 tokens: the package takes 1 to 16" in refuse("run", file, "--ids", ",".join(["1"] * 17))
    assert "no tokenizer" in refuse("run", file, "--text", "the", "--base", tmp_path)


def test_export_names_every_tenant_once(delta_file: Path, bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for tenants in ([delta_file, delta_file], [f"a={delta_file}", f"a={delta_file}"], [f"={delta_file}"]):
        assert "NAME=" in refuse("export", bert_pair.base, *tenants, "-o", tmp_path / "x.pt2")
    assert "base" in refuse("export", bert_pair.stranger, delta_file, "-o", tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_one_sentence(bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    missing = tmp_path / "missing"
    for command in (
        ["inspect", missing],
        ["verify", missing, bert_pair.base, bert_pair.tuned],
        ["materialize", bert_pair.base, missing, "-o", tmp_path / "out"],
        ["import-bitdelta", missing, bert_pair.base, "-o", tmp_path / "out"],
        ["compress", missing, bert_pair.tuned, "-o", tmp_path / "out"],
        ["export", bert_pair.base, missing, "-o", tmp_path / "out.pt2"],
        ["run", missing, "--ids", "1"],
    ):
        assert "missing" in refuse(*command)
    assert not list(tmp_path.iterdir())


def test_a_truncated_file(delta_file: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.safetensors"
    short.write_bytes(delta_file.read_bytes()[:-100])
    assert "short.safetensors" in refuse("inspect", short)


def test_the_wrong_base(delta_file: Path, bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "base" in refuse("materialize", bert_pair.stranger, delta_file, "-o", tmp_path / "out")
    assert "base" in refuse("verify", delta_file, bert_pair.stranger, bert_pair.tuned)
    assert not (tmp_path / "out").exists()


def test_a_foreign_architecture(bert_pair, llama_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refuse("compress", bert_pair.base, llama_pair.tuned, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_text(bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = tmp_path / "text.txt"
    text.write_text("\n\n")
    sentence = refuse("compress", bert_pair.base, bert_pair.tuned, "-o", tmp_path / "out", "--text", text)
    assert "holds no text" in sentence


def test_debug_shows_the_error_itself(tmp_path: Path) -> None:
    assert isinstance(bitdelta("--debug", "inspect", tmp_path / "missing").exception, DeltaFileError | OSError)


def test_usage_errors_exit_with_2() -> None:
    assert bitdelta("compress").exit_code == 2
    assert bitdelta("inspect", "file", "--nonsense").exit_code == 2


def test_version() -> None:
    assert succeed("--version").startswith("bitdelta 0.")


def test_doctor() -> None:
    assert "torch" in succeed("doctor")
    found = json.loads(succeed("doctor", "--json"))
    assert torch.__version__ in found["findings"]["torch"]
    assert found["problems"] == []


def test_doctor_fails_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = bitdelta("doctor", "--json")
    assert result.exit_code == 1
    assert "C++ compiler" in json.loads(result.stdout)["problems"][0]


def test_doctor_tries_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "does not work: no such thing" in doctor.examine().problems[0]


def found_by_the_demo(out: Path) -> demo.DemoResult:
    scores = [fidelity.Fidelity("encoder", 0.9, after, 8, "texts") for after in (0.98, 0.999)]
    tenant = demo.TenantResult("sre", *scores, 90_000_000, 3_600_000, 1e-5, 1.5, 20.0)
    rows = [
        demo_rows.Row("sre", "[one] two three four five", 2e-6, 0.11, {"base": 0.97}),
        demo_rows.Row("base", "six", 3e-6, None, {"sre": 1.25}),
    ]
    changes = demo_tenants.Changes(24, 48, 21, 20, 21, 0.012, Compiled(0, 0, 0))
    packaged = demo_package.Packaged("tenants.pt2", 98_000_000, (6, 5, 1), 4e-6, 5e-6, 8.0, 31.0)
    many = demo_tenants.ManyTenants(rows, changes, packaged)
    return demo.DemoResult([tenant], many, "linear = delta_linear", [out / "fidelity.png"])


def test_demo_shows_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def run(out: Path, cache: Path, *, quick: bool, progress: Progress) -> demo.DemoResult:
        asked.update(out=out, cache=cache, quick=quick)
        progress("stage", 1, 1)
        return found_by_the_demo(out)

    monkeypatch.setattr(demo, "run", run)
    shown = succeed("demo", "--out", tmp_path / "out", "--quick")
    assert asked == {"out": tmp_path / "out", "cache": materials.default_cache(), "quick": True}
    for expected in ("0.90000", "0.8000", "0.9900", "25.0x", "12.5x", "1.0e-05", "delta_linear", "fidelity.png"):
        assert expected in shown
    for expected in ("[one]", "2.0e-06", "0.11", "0.97", "1.25", "24 calls", "12 ms", "98.00 MB", "6, 5, 1", "5.0e-06"):
        assert expected in shown


def test_demo_fails_where_it_finds_something_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(out: Path, cache: Path, *, quick: bool, progress: Progress) -> demo.DemoResult:
        raise demo_rows.DemoFailedError("a row of sre is off")

    monkeypatch.setattr(demo, "run", run)
    result = bitdelta("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "a row of sre is off" in result.stderr
    assert not result.stdout
