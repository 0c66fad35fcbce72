"""Scale distillation: the delta path against dense weights, gradients, what training does and refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from bitdelta_compile.kernels import layout
from torch import Tensor, nn

import bitdelta_compile as bdc
from bitdelta_compile import fidelity
from bitdelta_compile.compress.deltapath import DeltaPath, TrainedSign
from bitdelta_compile.compress.distill import distill
from bitdelta_compile.delta import Delta
from bitdelta_compile.encodings import Dense, Rows, Sign
from bitdelta_compile.errors import BaseMismatchError, BitDeltaError, CalibrationError, UnsupportedError

TEXTS = ["the language is a value of python and it is to be", "python is not the language that it is for a value"] * 8


def sign(rows: int, features: int, *, planes: int = 2, rank: int = 2, transposed: bool = False) -> Sign:
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Sign(
        (features, rows) if transposed else (rows, features),
        torch.float32,
        layout.pack(random(planes, rows, features) > 0),
        random(planes, rows),
        random(planes, features),
        random(rows, rank).bfloat16(),
        random(rank, features).bfloat16(),
        transposed,
    )


def trained(encoding: Sign, per: Any = "row") -> TrainedSign:
    found = TrainedSign(encoding, per, torch.device("cpu"))
    found.compute = torch.float32
    with torch.no_grad():
        found.factor += torch.rand(found.factor.shape, generator=torch.Generator().manual_seed(5))
    return found


USES = {
    "linear": (lambda x, w: F.linear(x, w), False),
    "matmul": (lambda x, w: x @ w.T, False),
    "Conv1D": (lambda x, w: torch.addmm(x.new_zeros(w.shape[1]), x, w), True),
    "linear of a transposed one": (lambda x, w: F.linear(x, w.T), True),
    "converted": (lambda x, w: F.linear(x.double(), w.double()).float(), False),
}


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("use", USES)
def test_the_delta_path_equals_dense_weights_gradients_included(use: str, per: str) -> None:
    call, transposed = USES[use]
    planes = trained(sign(6, 37, transposed=transposed), per)
    base, x = torch.randn(planes.sign.shape), torch.randn(5, 37, requires_grad=True)
    with DeltaPath([(base, planes)]):
        found = call(x, base)
    dense = (base + planes.dense()).detach().requires_grad_()
    expected = call(x, dense)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    got = torch.autograd.grad(found, [x, planes.factor], upstream)
    dx, dweight = torch.autograd.grad(expected, [x, dense], upstream)
    (dfactor,) = torch.autograd.grad(planes.dense(), [planes.factor], dweight)
    torch.testing.assert_close(got[0], dx)
    torch.testing.assert_close(got[1], dfactor, rtol=1e-4, atol=1e-4)


def test_looked_up_rows_equal_those_of_the_dense_table() -> None:
    planes = trained(sign(9, 33))
    base, ids = torch.randn(9, 33), torch.tensor([[0, 8, 3], [3, 3, 1]])
    with DeltaPath([(base, planes)]):
        found = F.embedding(ids, base, 0)
    torch.testing.assert_close(found, F.embedding(ids, base + planes.dense()))
    (got,) = torch.autograd.grad(found.square().sum(), [planes.factor])
    assert got[:, [2, 4, 5, 6, 7]].count_nonzero() == 0
    assert got[:, [0, 1, 3, 8]].count_nonzero() == 8


def test_dense_delta_is_that_of_the_encoding() -> None:
    for transposed in (False, True):
        encoding = sign(6, 37, transposed=transposed)
        torch.testing.assert_close(TrainedSign(encoding, "row", torch.device("cpu")).dense(), encoding.delta())


def test_other_parameters_and_queries_are_left_alone() -> None:
    planes = trained(sign(6, 37))
    base, other = torch.randn(6, 37), torch.randn(6, 37)
    path = DeltaPath([(base, planes)])
    with path:
        assert base.dtype is torch.float32
        assert base.shape == (6, 37)
        assert torch.equal(F.linear(other, other), other @ other.T)
        assert not path._dense


def relative(start: Delta, other: Delta) -> dict[str, Tensor]:
    """Row scales over those of the start."""
    pairs = {name: (e, other.encodings[name]) for name, e in start.encodings.items() if isinstance(e, Sign)}
    return {name: after.row_scale / before.row_scale for name, (before, after) in pairs.items()}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def start(llama_pair: Any) -> Delta:
    return bdc.compress(llama_pair.base, llama_pair.tuned, method="mean_abs")


def copies(delta: Delta) -> dict[str, dict[str, Tensor]]:
    return {
        name: {field: value.clone() for field, value in encoding.tensors().items()}
        for name, encoding in delta.encodings.items()
    }


@pytest.mark.parametrize("pair", ["llama_pair", "bert_pair"])
def test_training_brings_the_outputs_nearer(pair: str, request: pytest.FixtureRequest) -> None:
    folders = request.getfixturevalue(pair)
    before = bdc.compress(folders.base, folders.tuned, method="mean_abs")
    kept = copies(before)
    after = distill(
        folders.base, folders.tuned, before, TEXTS, steps=30, length=8, learning_rate=0.02, relative=True, per="row"
    )
    losses: Any = after.report["distillation"]
    assert losses["loss_end"] < 0.95 * losses["loss_start"]
    scores = [fidelity.verify(delta, folders.base, folders.tuned, TEXTS[:2]).recovered for delta in (before, after)]
    assert scores[1] > scores[0] + 0.01  # type: ignore[operator]
    for name, tensors in copies(before).items():  # the start is not touched, and nothing but scales moved
        for field, value in tensors.items():
            assert torch.equal(value, kept[name][field])
            assert field == "row_scale" or torch.equal(value, after.encodings[name].tensors()[field])
    assert any(float((ratio - 1).abs().max()) > 0.01 for ratio in relative(before, after).values())


def test_as_published_one_number_per_matrix_moves_by_the_rate(llama_pair: Any, start: Delta) -> None:
    once = distill(llama_pair.base, llama_pair.tuned, start, TEXTS, steps=1, length=8, learning_rate=1e-5)
    for name, encoding in once.encodings.items():
        if isinstance(encoding, Sign):
            moved = encoding.row_scale - start.encodings[name].row_scale  # type: ignore[attr-defined]
            assert float(moved.max() - moved.min()) < 1e-8
            assert abs(float(moved.abs().mean()) - 1e-5) < 2e-8


def test_the_seed_decides(llama_pair: Any, start: Delta, tmp_path: Path) -> None:
    files = []
    for place, seed in enumerate((0, 0, 1)):
        # 13 batches for 20 steps: some of the tuned model's outputs are used again.
        options = {"steps": 20, "batch": 1, "length": 13, "learning_rate": 0.01, "relative": True, "seed": seed}
        distill(llama_pair.base, llama_pair.tuned, start, TEXTS, **options).save(tmp_path / str(place))  # type: ignore[arg-type]
        files.append((tmp_path / str(place)).read_bytes())
    assert files[0] == files[1] != files[2]
    told = str(Delta.load(tmp_path / "2").options["distilled"])
    assert "steps 20" in told
    assert "seed 1" in told


@pytest.mark.parametrize("per", ["matrix", "row"])
def test_an_interrupted_training_goes_on_where_it_was(per: Any, llama_pair: Any, start: Delta, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    taken: list[int] = []

    def train(name: str, work_dir: Path | None = None, stop_at: int = 0, seed: int = 0) -> bytes:
        def report(stage: str, done: int, total: int) -> None:
            taken.append(done)
            if done == stop_at:
                raise Interrupted

        options: Any = {"steps": 9, "batch": 1, "length": 13, "learning_rate": 0.01, "relative": True, "per": per}
        delta = distill(
            llama_pair.base, llama_pair.tuned, start, TEXTS, **options,
            seed=seed, work_dir=work_dir, progress=report,
        )  # fmt: skip
        delta.save(tmp_path / name)
        return (tmp_path / name).read_bytes()

    whole = train("whole")
    work = tmp_path / "work"
    for stop_at in (2, 6):
        with pytest.raises(Interrupted):
            train("part", work, stop_at)
    taken.clear()
    assert train("resumed", work) == whole
    assert taken == [7, 8, 9]
    with pytest.raises(UnsupportedError, match="another compression"):
        train("other", work, seed=1)
    state = work / "distillation" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UnsupportedError, match="delete it"):
        train("damaged", work)


def with_rows(delta: Delta, values: float) -> tuple[Delta, str]:
    """The delta with two rows of its table stored outright."""
    name = next(name for name, e in delta.encodings.items() if isinstance(e, Sign) and "embed" in name)
    sign = delta.encodings[name]
    assert isinstance(sign, Sign)
    stored = torch.full((2, sign.in_features), values)
    rows = Rows(sign.shape, sign.dtype, torch.tensor([1, 5]), stored, sign)
    return dataclasses.replace(delta, encodings={**delta.encodings, name: rows}), name


def test_planes_under_stored_rows_are_trained_too(llama_pair: Any, start: Delta) -> None:
    given, name = with_rows(start, 0.5)
    after = distill(
        llama_pair.base, llama_pair.tuned, given, TEXTS, steps=3, length=8, learning_rate=0.02, relative=True
    )
    before, found = given.encodings[name], after.encodings[name]
    assert isinstance(before, Rows)
    assert isinstance(found, Rows)
    assert before.over is not None
    assert found.over is not None
    assert torch.equal(found.values, before.values)
    kept = [row for row in range(before.over.out_features) if row not in (1, 5)]
    assert not torch.equal(found.over.row_scale[:, kept], before.over.row_scale[:, kept])


def test_another_start_is_refused(llama_pair: Any, start: Delta, tmp_path: Path) -> None:
    for values, refused in ((0.5, False), (0.25, True)):
        given, _ = with_rows(start, values)
        options: Any = {"steps": 1, "length": 8, "learning_rate": 1e-6, "work_dir": tmp_path}
        if refused:
            with pytest.raises(UnsupportedError, match="its start is another"):
                distill(llama_pair.base, llama_pair.tuned, given, TEXTS, **options)
        else:
            distill(llama_pair.base, llama_pair.tuned, given, TEXTS, **options)


def test_the_tuned_model_runs_once_per_batch(llama_pair: Any, start: Delta) -> None:
    tuned, _ = fidelity.load_model(llama_pair.tuned)
    trained = []  # the copy that is trained inherits the hook
    tuned.register_forward_hook(lambda *_: trained.append(torch.is_grad_enabled()))
    batches = [{"input_ids": torch.randint(64, (2, 6))} for _ in range(3)]
    distill(llama_pair.base, tuned, start, batches, steps=8, learning_rate=1e-6)
    assert (trained.count(False), trained.count(True)) == (3, 8)


@pytest.mark.parametrize(("pair", "stage"), [("llama_pair", "sample"), ("bert_pair", None)])
def test_without_data_models_read_what_they_write_or_random_tokens(
    pair: str, stage: str | None, request: pytest.FixtureRequest
) -> None:
    folders = request.getfixturevalue(pair)
    stages: list[str] = []
    options: Any = {"steps": 30, "length": 8, "learning_rate": 0.02, "relative": True, "per": "row"}
    before = bdc.compress(folders.base, folders.tuned, method="mean_abs")
    after = distill(folders.base, folders.tuned, before, progress=lambda name, *_: stages.append(name), **options)
    losses: Any = after.report["distillation"]
    assert losses["loss_end"] < losses["loss_start"]
    assert set(stages) == {"distill", stage or "distill"}


def test_modules_tables_and_whatever_is_stored_outright(llama_pair: Any, start: Delta) -> None:
    base, tuned = (fidelity.load_model(folder)[0] for folder in (llama_pair.base, llama_pair.tuned))
    tuned.train()
    name, other = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    value = dict(tuned.named_parameters())[other].detach()
    encodings = {**start.encodings, other: Dense(tuple(value.shape), value.dtype, value)}
    assert isinstance(encodings[name], Sign)  # tied: looked up, and the head
    kept = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    delta = dataclasses.replace(start, encodings=encodings)
    after = distill(base, tuned, delta, TEXTS, steps=2, length=8, learning_rate=0.01, relative=True)
    assert float((relative(delta, after)[name] - 1).abs().max()) > 0.005
    assert after.encodings[other] is encodings[other]
    assert tuned.training
    assert all(torch.equal(tensor, kept[key]) for key, tensor in tuned.state_dict().items())
    assert all(parameter.requires_grad for parameter in tuned.parameters())


def test_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    base, tuned = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    tuned.load_state_dict({key: value + 0.003 * torch.randn_like(value) for key, value in base.state_dict().items()})
    batches = [{"input_ids": torch.randint(64, (2, 8))}]
    after = distill(base, tuned, None, batches, steps=25, learning_rate=0.02, relative=True, per="row")
    assert any(isinstance(encoding, Sign) and encoding.transposed for encoding in after.encodings.values())
    losses: Any = after.report["distillation"]
    assert losses["loss_end"] < 0.9 * losses["loss_start"]


def test_a_diverging_run_is_one_sentence(llama_pair: Any, start: Delta) -> None:
    with pytest.raises(BitDeltaError, match=r"distillation diverged: .* learning rate below 0.9"):
        distill(llama_pair.base, llama_pair.tuned, start, TEXTS, steps=20, length=8, learning_rate=0.9)


def test_a_tuned_model_that_gives_nan_is_refused(llama_pair: Any, start: Delta) -> None:
    tuned, _ = fidelity.load_model(llama_pair.tuned)

    def damage(model: nn.Module, args: Any, output: Any) -> None:
        output.logits.fill_(torch.nan)

    tuned.register_forward_hook(damage)
    with pytest.raises(CalibrationError, match="gives NaN or infinite values on calibration batch 0"):
        distill(llama_pair.base, tuned, start, [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}], steps=1)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x, self.weight)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"batch": 1.5}, "batch must be"),
        ({"length": -1}, "length must be"),
        ({"learning_rate": 0.0}, "learning_rate must be between 0 and 1"),
        ({"per": "plane"}, "per must be 'matrix' or 'row'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str, llama_pair: Any, start: Delta) -> None:
    with pytest.raises(UnsupportedError, match=said):
        distill(llama_pair.base, llama_pair.tuned, start, TEXTS, **options)


def test_what_cannot_be_trained(llama_pair: Any, start: Delta) -> None:
    tuned = fidelity.load_model(llama_pair.tuned)[0]
    dense = {name: e for name, e in start.encodings.items() if not isinstance(e, Sign)}
    with pytest.raises(UnsupportedError, match="no sign plane"):
        distill(llama_pair.base, tuned, dataclasses.replace(start, encodings=dense), TEXTS, steps=1)
    with pytest.raises(CalibrationError, match="no token"):
        distill(llama_pair.base, llama_pair.tuned, start, ["", " "], steps=1)
    with pytest.raises(CalibrationError, match=r"does not run on the calibration batch \(x\)"):
        distill(llama_pair.base, tuned, start, [{"x": torch.ones(1, 4)}], steps=1)
    with pytest.raises(BaseMismatchError, match="base"):
        distill(llama_pair.stranger, tuned, start, TEXTS, steps=1)
    base, odd = Odd(), Odd()
    with torch.no_grad():
        odd.weight += 0.01 * torch.randn(64, 64)
    delta = bdc.compress(base, odd, [{"x": torch.randn(8, 64)}])
    with pytest.raises(UnsupportedError, match="Odd gives neither logits nor hidden states"):
        distill(base, odd, delta, [{"x": torch.randn(2, 64)}], steps=1)
