"""generate with tenants: each row against the row's dense model alone in plain transformers, settings, errors."""

from __future__ import annotations

import copy
import string
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from bitdelta_compile.errors import BitDeltaError, UnsupportedError
from bitdelta_compile.serve.generate import Forward, Profile, generate
from bitdelta_compile.serve.view import Call, view_of

V = 60
PROMPTS = ([7, 8, 9, 10, 11, 12], [13, 14, 15], [16, 17, 18, 19])


ARCHITECTURES = ("llama", "qwen2", "gpt2", "t5")
Made = Callable[..., Any]


class Shifts:
    """Fine-tunes that need no compiler: each adds to the logits, and to the encoder's states, a vector of its own."""

    def __init__(self, base: Any, count: int = 3) -> None:
        self.base = base
        generator = torch.Generator().manual_seed(3)
        self.logits = 2.0 * torch.randn(count, V, generator=generator)
        self.states = torch.randn(count, 32, generator=generator)
        self.calls: list[tuple[nn.Module, int]] = []

    def shift(self, module: nn.Module, found: Any, tenants: Sequence[int]) -> Any:
        name, vectors = ("logits", self.logits) if module is self.base else ("last_hidden_state", self.states)
        values = found[name]
        rows = vectors[list(tenants)].repeat_interleave(values.shape[0] // len(tenants), dim=0)
        found[name] = values + rows[:, None]
        return found

    def forward(self, tenants: Sequence[int]) -> Forward:
        """What an attached model gives to generate."""

        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.calls.append((module, threading.get_ident()))
            return self.shift(module, module(*args, **kwargs), tenants)

        return run

    def dense(self, tenant: int) -> Any:
        model = copy.deepcopy(self.base)
        alone = copy.copy(self)
        alone.base = model
        for module in [model, *([model.get_encoder()] if model.config.is_encoder_decoder else [])]:
            module.register_forward_hook(lambda module, _, found: alone.shift(module, found, [tenant]))
        return model


def batch(base: Any, pad: Sequence[int] = (0, 0, 0), rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
    """Prompts of different lengths, padded as the architecture wants it, each with its own pad token."""
    length = max(len(PROMPTS[row]) for row in rows)
    ids, masks = [], []
    for row in rows:
        fill = length - len(PROMPTS[row])
        padding, prompt = [pad[row]] * fill, list(PROMPTS[row])
        right = base.config.is_encoder_decoder
        ids.append(prompt + padding if right else padding + prompt)
        masks.append([1] * len(prompt) + [0] * fill if right else [0] * fill + [1] * len(prompt))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def alone(model: Any, config: GenerationConfig, row: int, **kwargs: Any) -> Any:
    """The row's prompt, unpadded, through plain transformers with the tenant's own generation config."""
    model.generation_config = config
    ids = torch.tensor([PROMPTS[row]])
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)


def new(base: Any, sequences: Tensor, row: int | None = None) -> list[list[int]]:
    """Generated tokens: of the batch, or of a row that ran alone."""
    start = 1 if base.config.is_encoder_decoder else max(map(len, PROMPTS)) if row is None else len(PROMPTS[row])
    return [list(each) for each in sequences[:, start:].tolist()]


def configs(base: Any, **per_row: Sequence[Any]) -> list[GenerationConfig]:
    """Three copies of the base's generation config with one value each of these settings."""
    found = []
    for row in range(3):
        config = copy.deepcopy(base.generation_config)
        for name, values in per_row.items():
            setattr(config, name, values[row])
        found.append(config)
    return found


def ending(base: Any, shifts: Shifts, **kwargs: Any) -> list[GenerationConfig]:
    """Generation configs with which each tenant ends somewhere else: end tokens that it does generate."""
    ends = []
    for row, (at, spare) in enumerate(zip((2, 9, 5), ([], [50], [51, 52]), strict=True)):
        free = copy.deepcopy(base.generation_config)
        free.eos_token_id = None
        tokens = new(base, alone(shifts.dense(row), free, row, max_new_tokens=12, **kwargs), row)[0]
        ends.append([tokens[at], *spare])
    return configs(base, eos_token_id=[ends[0][0], *ends[1:]], pad_token_id=[53, 54, 55])


def profiles(settings: Sequence[GenerationConfig | None]) -> list[Profile]:
    return [Profile(f"t{row}", config) for row, config in enumerate(settings)]


def check_rows(found: list[list[int]], expected: Sequence[list[list[int]]], pads: Sequence[int]) -> None:
    """Every row is what it is alone, filled up with its own pad token; rows are grouped by tenant."""
    times = len(found) // len(expected)
    longest = max(len(each) for rows in expected for each in rows)
    for tenant, rows in enumerate(expected):
        for each, row in zip(found[tenant * times : (tenant + 1) * times], rows, strict=True):
            assert each == row + [pads[tenant]] * (longest - len(row))


# Rows against dense models alone


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("how", ["greedy", "static", "uncached", "beams", "returned"])
def test_each_row_is_its_dense_model_alone(kind: str, how: str, made: Made) -> None:
    base = made(kind)
    shifts = Shifts(base)
    kwargs: dict[str, Any] = {
        "greedy": {},
        "static": {"cache_implementation": "static"},
        "uncached": {"use_cache": False},
        "beams": {"num_beams": 3},
        "returned": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 0.5},
    }[how]
    settings = ending(base, shifts)
    found = generate(
        base, shifts.forward([0, 1, 2]), profiles(settings), {**batch(base), "max_new_tokens": 12, **kwargs}
    )
    expected = []
    for row, config in enumerate(settings):
        rows = new(base, alone(shifts.dense(row), config, row, max_new_tokens=12, **kwargs), row)
        # What a row alone is filled up with, between beams of different lengths, is its own pad token too.
        expected.append(rows)
    assert len({len(rows[0]) for rows in expected}) > 1 or how in ("beams", "returned")
    check_rows(new(base, found), expected, (53, 54, 55))
    assert {module for module, _ in shifts.calls} == {base, *([base.get_encoder()] if kind == "t5" else [])}


def test_a_row_with_many_end_tokens_keeps_as_many_beams_as_alone(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = configs(base, eos_token_id=[2, list(range(58)), [3, 4]])
    kwargs = {"max_new_tokens": 6, "num_beams": 2, "length_penalty": 8.0, "early_stopping": "never"}
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**batch(base), **kwargs})
    expected = [new(base, alone(shifts.dense(row), settings[row], row, **kwargs), row) for row in range(3)]
    assert len(expected[1][0]) > 1
    check_rows(new(base, found), expected, (2, 0, 3))


def test_rows_may_be_repeated_and_the_base_among_them(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    shifts.logits[0] = 0.0
    settings = ending(base, shifts)
    base.generation_config = settings[0]
    plan = [Profile("t2", settings[2]), Profile(None), Profile("t2", settings[2])]
    inputs = batch(base, rows=(0, 1, 0))
    found = new(base, generate(base, shifts.forward([2, 0, 2]), plan, {**inputs, "max_new_tokens": 12}))
    assert found[0] == found[2]
    expected = [
        new(base, alone(shifts.dense(tenant), settings[tenant], row, max_new_tokens=12), row)
        for tenant, row in ((2, 0), (0, 1), (2, 0))
    ]
    check_rows(found, expected, (55, 53, 55))


def test_logits_and_scores_are_those_of_the_dense_models(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = configs(base, eos_token_id=[2, [3, 4], 5], suppress_tokens=[None, [20], [21]])
    kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    kwargs |= {"output_scores": True, "output_logits": True}
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**batch(base), **kwargs})
    for row, config in enumerate(settings):
        exact = alone(shifts.dense(row), config, row, **kwargs)
        for step in range(6):
            torch.testing.assert_close(found.logits[step][row], exact.logits[step][0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.scores[step][row], exact.scores[step][0], atol=1e-4, rtol=1e-4)
    assert found.scores[0][1, 20] == -torch.inf
    assert found.scores[0][2, 20] > -torch.inf


# Settings


ROW_SETTINGS: dict[str, tuple[Any, Any, Any]] = {
    "repetition_penalty": (1.0, 3.0, 1.5),
    "no_repeat_ngram_size": (0, 1, 2),
    "suppress_tokens": (None, list(range(0, V, 2)), list(range(1, V, 2))),
    "begin_suppress_tokens": (None, list(range(20, 50)), list(range(10, 50))),
    "bad_words_ids": (None, [[each] for each in range(0, V, 3)], [[each] for each in range(1, V, 3)]),
    "sequence_bias": (None, [[[each], 40.0] for each in range(1, 9)], [[[each], -40.0] for each in range(1, 30)]),
    "forced_eos_token_id": (None, 30, 31),
    "watermarking_config": (None, *(transformers.WatermarkingConfig(bias=bias) for bias in (20.0, 9.0))),
    "exponential_decay_length_penalty": (None, (2, 8.0), (4, 3.0)),
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ROW_SETTINGS)
def test_settings_that_process_logits_are_each_tenants_own(name: str, beams: int, made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = configs(base, **{name: ROW_SETTINGS[name]}, eos_token_id=[30, [31], [32, 33]])
    kwargs = {"max_new_tokens": 8, "num_beams": beams}
    # Equally long: in older transformers left padding is under the penalties like any other token of the prompt.
    inputs = {"input_ids": torch.tensor([PROMPTS[0]] * 3), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**inputs, **kwargs})
    expected = [new(base, alone(shifts.dense(row), settings[row], 0, **kwargs), 0) for row in range(3)]
    plain = copy.deepcopy(settings)
    for config in plain:
        setattr(config, name, None)
    without = [new(base, alone(shifts.dense(row), plain[row], 0, **kwargs), 0) for row in range(3)]
    assert expected[1:] != without[1:]
    pads = [30, 31, 32] if beams > 1 else [0, 0, 0]
    check_rows(new(base, found), expected, pads)


@pytest.mark.parametrize("name", ["encoder_repetition_penalty", "encoder_no_repeat_ngram_size"])
def test_settings_about_the_encoders_tokens_are_each_tenants_own(name: str, made: Made) -> None:
    base = made("t5")
    shifts = Shifts(base)
    shifts.logits[:, PROMPTS[1]] += 12.0
    settings = configs(base, **{name: (0.1, 0.2, 8.0) if "penalty" in name else (0, 1, 1)})
    inputs = {"input_ids": torch.tensor([PROMPTS[0][:3], PROMPTS[1], PROMPTS[1]])}
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**inputs, "max_new_tokens": 6})
    changed = 0
    for row, config in enumerate(settings):
        model = shifts.dense(row)
        free = model.generate(inputs["input_ids"][row : row + 1], max_new_tokens=6)
        model.generation_config = config
        exact = model.generate(inputs["input_ids"][row : row + 1], max_new_tokens=6)
        changed += exact.tolist() != free.tolist()
        assert found[row, : exact.shape[1]].tolist() == exact[0].tolist()
    assert changed


@pytest.mark.parametrize("beams", [1, 2])
def test_penalties_of_padded_rows_are_those_of_a_padded_dense_batch(beams: int, made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = configs(base, repetition_penalty=[1.5, 3.0, 2.0])
    inputs, kwargs = batch(base), {"max_new_tokens": 8, "num_beams": beams}
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**inputs, **kwargs})
    for row, config in enumerate(settings):
        model = shifts.dense(row)
        model.generation_config = config
        expected = model.generate(**inputs, **kwargs)[row]
        assert found[row, : len(expected)].tolist() == expected[: found.shape[1]].tolist()


def test_minimum_length_holds_back_each_tenants_own_end(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = ending(base, shifts)
    kwargs = {"max_new_tokens": 12, "min_new_tokens": 8}
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**batch(base), **kwargs})
    expected = [new(base, alone(shifts.dense(row), settings[row], row, **kwargs), row) for row in range(3)]
    assert all(len(rows[0]) >= 8 for rows in expected)
    check_rows(new(base, found), expected, (53, 54, 55))


def test_start_tokens_of_encoder_decoders_are_each_tenants_own(made: Made) -> None:
    base = made("t5")
    shifts = Shifts(base)
    settings = configs(base, decoder_start_token_id=[0, 40, 41], forced_bos_token_id=[None, 30, 31])
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**batch(base), "max_new_tokens": 6})
    assert found[:, 0].tolist() == [0, 40, 41]
    assert found[1:, 1].tolist() == [30, 31]
    expected = [new(base, alone(shifts.dense(row), settings[row], row, max_new_tokens=6), row) for row in range(3)]
    check_rows(new(base, found), expected, (0, 0, 0))


def test_padding_without_a_mask_is_found_by_each_tenants_own_pad_token(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = ending(base, shifts)
    inputs = batch(base, pad=(53, 54, 55))
    del inputs["attention_mask"]
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**inputs, "max_new_tokens": 12})
    expected = [new(base, alone(shifts.dense(row), settings[row], row, max_new_tokens=12), row) for row in range(3)]
    check_rows(new(base, found), expected, (53, 54, 55))


def test_settings_that_all_rows_share_apply_though_the_base_has_others(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = configs(base, num_beams=[3] * 3, max_new_tokens=[9] * 3, length_penalty=[2.0] * 3)
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), batch(base))
    expected = [new(base, alone(shifts.dense(row), settings[row], row), row) for row in range(3)]
    check_rows(new(base, found), expected, (2, 2, 2))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_beams", (1, 1, 2)),
        ("max_new_tokens", (5, 5, 6)),
        ("max_length", (20, None, 20)),
        ("use_cache", (True, True, False)),
    ],
)
def test_settings_of_the_shared_loop_must_agree_or_be_given(name: str, values: tuple[Any, ...], made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    plan = profiles(configs(base, **{name: values}))
    with pytest.raises(UnsupportedError, match=rf"{name} .*tenant 't0'.*tenant 't[12]'.*Pass {name}="):
        generate(base, shifts.forward([0, 1, 2]), plan, batch(base))
    given = {"max_new_tokens": 12, **({name: values[0]} if values[0] not in (5, 20) else {})}
    assert generate(base, shifts.forward([0, 1, 2]), plan, {**batch(base), **given}).shape[0] == 3
    given_config = GenerationConfig(**given)
    arguments = {**batch(base), "generation_config": given_config}
    assert generate(base, shifts.forward([0, 1, 2]), plan, arguments).shape[0] == 3


def test_the_default_length_counts_new_tokens_for_the_base_and_its_tenants(made: Made) -> None:
    base = made()
    plan = [Profile(None), *profiles(configs(base))[1:]]
    with pytest.warns(UserWarning, match="model-agnostic default"):
        found = generate(base, Shifts(base).forward([0, 1, 2]), plan, {**batch(base), "eos_token_id": 59})
    assert found.shape == (3, 26)


def test_settings_without_effect_may_differ(made: Made) -> None:
    base = made()
    free = {"length_penalty": [1.0, 2.0, 3.0], "num_assistant_tokens": [5, 6, 7], "chat_format": ["a", "b", "c"]}
    plan = profiles(configs(base, max_length=[30, None, 40], min_length=[0, 5, 6], **free))
    kwargs = {"max_new_tokens": 3, "min_new_tokens": 1}
    assert generate(base, Shifts(base).forward([0, 1, 2]), plan, {**batch(base), **kwargs}).shape == (3, 9)


def test_settings_given_to_the_call_are_everyones(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = ending(base, shifts)
    ends = torch.tensor(settings[1].eos_token_id)
    kwargs = {"max_new_tokens": 12, "eos_token_id": ends, "pad_token_id": 9}
    given = {"generation_config": GenerationConfig(**kwargs)}
    expected = [new(base, alone(shifts.dense(row), settings[row], row, **kwargs), row) for row in range(3)]
    for each in (kwargs, given):
        found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**batch(base), **each})
        check_rows(new(base, found), expected, (9, 9, 9))


# Sampling


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def sampled(base: Any, settings: Sequence[Any], rows: Sequence[int], found_by: Sequence[int], **kwargs: Any) -> Any:
    """A sampled call of these tenants, each with its prompt and a generator seeded by its number (or another)."""
    shifts = Shifts(base)
    plan = [profiles(settings)[row] for row in rows]
    arguments = {**batch(base, rows=rows), "max_new_tokens": 8, "do_sample": True, **kwargs}
    return generate(base, shifts.forward(rows), plan, arguments, generators=seeds(*found_by))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_row_draws_what_its_dense_model_draws_alone_from_the_same_seed(kind: str, made: Made) -> None:
    base = made(kind)
    shifts = Shifts(base)
    settings = configs(
        base, temperature=[0.7, 2.0, 3.0], top_k=[0, 20, 5], top_p=[0.9, 1.0, 1.0], eos_token_id=[[2, 3], 4, 5],
        renormalize_logits=[False, True, False],
    )  # fmt: skip
    found = new(base, sampled(base, settings, (0, 1, 2), (5, 6, 7)))
    expected = []
    for row, config in enumerate(settings):
        torch.manual_seed(5 + row)
        expected.append(new(base, alone(shifts.dense(row), config, row, max_new_tokens=8, do_sample=True), row))
    check_rows(found, expected, (0, 0, 0))


@pytest.mark.parametrize("kwargs", [{}, {"num_return_sequences": 3}, {"num_beams": 3}])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_rows_draws_do_not_depend_on_its_neighbours(kwargs: dict[str, Any], mixed: bool, made: Made) -> None:
    base = made()
    settings: Any = configs(base, temperature=[4.0] * 3)
    if mixed:
        settings = configs(base, temperature=[4.0, 3.0, 2.0], eos_token_id=[list(range(40, 60)), 3, None])
    times = kwargs.get("num_return_sequences", 1)
    before = torch.get_rng_state()
    together = sampled(base, settings, (0, 1, 2), (5, 6, 7), **kwargs)
    others = sampled(base, settings, (2, 1, 0), (8, 6, 9), **kwargs)
    single = sampled(base, settings, (1,), (6,), **kwargs)
    assert torch.equal(before, torch.get_rng_state()), "the rows drew from torch's own generator"
    assert not torch.equal(together[:times], others[-times:])
    expected = new(base, single, 1)
    for found in (together, others):
        for row, again in zip(expected, new(base, found[times : 2 * times]), strict=True):
            ended = row.index(3) + 1 if mixed and 3 in row else len(row)
            assert again[:ended] == row[:ended]
            assert set(again[ended:]) <= {0, 3}
    if times > 1:
        assert len(set(map(tuple, expected))) == times


@pytest.mark.parametrize("beams", [1, 2])
def test_generators_end_alike_however_long_the_neighbours_go_on(beams: int, made: Made) -> None:
    base = made()
    settings = configs(base, temperature=[4.0] * 3, eos_token_id=[list(range(30)), None, None])
    states = []
    for rows in ((0, 1), (0, 2, 1)):
        generators = seeds(*rows)
        plan = [profiles(settings)[row] for row in rows]
        arguments = {**batch(base, rows=rows), "max_new_tokens": 12 + len(rows), "do_sample": True, "num_beams": beams}
        generate(base, Shifts(base).forward(rows), plan, arguments, generators=generators)
        states.append(generators[0].get_state())
    assert torch.equal(*states)


def test_without_generators_torchs_seed_decides(made: Made) -> None:
    base = made()
    plan = profiles(configs(base, temperature=[4.0] * 3))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        arguments = {**batch(base), "max_new_tokens": 8, "do_sample": True}
        found.append(generate(base, Shifts(base).forward([0, 1, 2]), plan, arguments))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_rows_that_sample_and_rows_that_do_not_share_a_call(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = configs(base, do_sample=[True, False, True], temperature=[3.0, 1.0, 3.0])
    for beams in (1, 3):
        kwargs = {**batch(base), "max_new_tokens": 8, "num_beams": beams}
        found = [
            generate(base, shifts.forward([0, 1, 2]), profiles(settings), kwargs, generators=seeds(*own))
            for own in ((1, 2, 3), (1, 4, 5))
        ]
        expected = new(base, alone(shifts.dense(1), settings[1], 1, max_new_tokens=8, num_beams=beams), 1)[0]
        assert new(base, found[0])[1][: len(expected)] == expected
        assert torch.equal(found[0][:2], found[1][:2])
        assert not torch.equal(found[0][2], found[1][2])


def test_sampled_scores_are_those_drawn_from(made: Made) -> None:
    base = made()
    seen = []

    class Last(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            seen.append(scores[-1].isfinite().sum(dim=1).tolist())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    settings = configs(base, top_k=[5, 6, 7], temperature=[2.0] * 3)
    kwargs = {"return_dict_in_generate": True, "output_scores": True}
    found = sampled(base, settings, (0, 1, 2), (1, 2, 3), stopping_criteria=[Last()], **kwargs)
    assert [scores.isfinite().sum(dim=1).tolist() for scores in found.scores] == [[5, 6, 7]] * 8
    assert seen == [[5, 6, 7]] * 8
    torch.testing.assert_close(
        base.compute_transition_scores(found.sequences, found.scores, normalize_logits=True).exp().sum(),
        sum(
            torch.softmax(scores, -1).gather(1, found.sequences[:, 6 + step, None]).sum()
            for step, scores in enumerate(found.scores)
        ),
    )


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        (lambda: seeds(1, 2), "generators must be 3.*are 2"),
        (lambda: seeds(1) * 3, "none of them twice.*1 of them different"),
        (
            lambda: [SimpleNamespace(device=torch.device("cuda")), *seeds(1, 2)],
            "generator of row 0 is on cuda.*inputs are on cpu",
        ),
    ],
)
def test_generators_that_do_not_fit_the_rows(
    generators: Callable[[], list[torch.Generator]], message: str, made: Made
) -> None:
    base = made()
    with pytest.raises(BitDeltaError, match=message):
        generate(
            base,
            Shifts(base).forward([0, 1, 2]),
            profiles([None] * 3),
            {**batch(base), "do_sample": True, "max_new_tokens": 2},
            generators=generators(),
        )


# What the caller passes in


def test_the_callers_processors_and_criteria_see_all_rows(made: Made) -> None:
    base = made()
    shapes = []

    class Only(LogitsProcessor):
        """Leaves each row one token of its own, by its place in the batch."""

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            shapes.append((input_ids.shape[0], scores.isneginf().sum(dim=1).tolist()))
            return torch.full_like(scores, -torch.inf).scatter_(1, 40 + torch.arange(3)[:, None], 0.0)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.tensor([input_ids.shape[1] == 8, input_ids.shape[1] == 9, False])

    settings = configs(base, suppress_tokens=[[1], [1, 2], [1, 2, 3]], top_k=[1, 2, 3], pad_token_id=[53, 54, 55])
    kwargs = {"logits_processor": [Only()], "stopping_criteria": [Stop()], "max_new_tokens": 5}
    found = sampled(base, settings, (0, 1, 2), (1, 2, 3), **kwargs)
    assert new(base, found) == [[40, 40, 53, 53, 53], [41, 41, 41, 54, 54], [42] * 5]
    assert shapes == [(3, [1, 2, 3])] * 5


def test_a_processor_of_the_callers_replaces_the_settings_one_of_its_kind(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = configs(base, suppress_tokens=[list(range(50)), list(range(20)), None])
    none = transformers.SuppressTokensLogitsProcessor([0])
    arguments = {**batch(base), "max_new_tokens": 5, "logits_processor": transformers.LogitsProcessorList([none])}
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), arguments)
    plain = configs(base, suppress_tokens=[[0]] * 3)
    expected = [new(base, alone(shifts.dense(row), plain[row], row, max_new_tokens=5), row) for row in range(3)]
    check_rows(new(base, found), expected, (0, 0, 0))


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_prefix_functions_get_the_entry_of_the_whole_batch(kwargs: dict[str, Any], made: Made) -> None:
    base = made()
    settings = configs(base, eos_token_id=[2, 3, 2])
    times = kwargs.get("num_return_sequences", 1)
    arguments = {
        **batch(base),
        "max_new_tokens": 2,
        "prefix_allowed_tokens_fn": lambda entry, ids: [20 + entry, 30 + entry],
    }
    found = generate(base, Shifts(base).forward([0, 1, 2]), profiles(settings), {**arguments, **kwargs})
    for entry, row in enumerate(new(base, found)):
        assert len(found) == 3 * times
        assert set(row) <= {20 + entry, 30 + entry}


def test_a_streamer_gets_a_rows_tokens_as_they_come(made: Made) -> None:
    base = made()
    got: list[list[int]] = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            got.append(value.flatten().tolist())

        def end(self) -> None:
            got.append([])

    found = sampled(base, [None] * 3, (1,), (1,), streamer=Streamer(), max_new_tokens=4)
    assert got == [PROMPTS[1], *[[token] for token in found[0, 3:].tolist()], []]


def test_stop_strings_are_each_tenants_own(made: Made) -> None:
    letters = (string.ascii_letters + string.digits)[:V]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({each: at for at, each in enumerate(letters)}, letters[0])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    base = made()
    shifts = Shifts(base)
    tokens = [
        new(base, alone(shifts.dense(row), base.generation_config, row, max_new_tokens=6), row)[0] for row in range(3)
    ]
    settings = configs(base, stop_strings=[letters[tokens[0][1]], [letters[tokens[1][3]], "!"], None])
    kwargs = {"max_new_tokens": 6, "tokenizer": tokenizer}
    found = generate(base, shifts.forward([0, 1, 2]), profiles(settings), {**batch(base), **kwargs})
    expected = [new(base, alone(shifts.dense(row), settings[row], row, **kwargs), row) for row in range(3)]
    assert len({len(rows[0]) for rows in expected}) > 1
    check_rows(new(base, found), expected, (0, 0, 0))


def test_guidance_runs_through_the_tenants_too(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    kwargs = {"max_new_tokens": 6, "guidance_scale": 1.8}
    found = generate(base, shifts.forward([0, 1, 2]), profiles([None] * 3), {**batch(base), **kwargs})
    expected = [new(base, alone(shifts.dense(row), base.generation_config, row, **kwargs), row) for row in range(3)]
    check_rows(new(base, found), expected, (0, 0, 0))


def test_inputs_may_be_embeddings_or_an_encoders_outputs(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    inputs = batch(base)
    plan, forward = profiles(ending(base, shifts)), shifts.forward([0, 1, 2])
    embedded = {"inputs_embeds": base.get_input_embeddings()(inputs["input_ids"]).detach(), "max_new_tokens": 12}
    found = generate(base, forward, plan, {**embedded, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(found, generate(base, forward, plan, {**inputs, "max_new_tokens": 12})[:, 6:])
    base = made("t5")
    shifts = Shifts(base)
    inputs, forward = batch(base), shifts.forward([0, 1, 2])
    states = forward(base.get_encoder(), (), dict(inputs))
    given = {"encoder_outputs": states, "attention_mask": inputs["attention_mask"], "max_new_tokens": 5}
    assert torch.equal(
        generate(base, forward, plan, given), generate(base, forward, plan, {**inputs, "max_new_tokens": 5})
    )


# Calls beside each other, and what stays as it was


def test_threads_with_different_tenants_do_not_mix(made: Made) -> None:
    base = made()
    shifts = Shifts(base)
    settings = ending(base, shifts)
    plans = [(0, 1, 2), (2, 1, 0), (1, 1, 0), (2, 2, 2)]
    barrier = threading.Barrier(len(plans))
    found: dict[int, Tensor] = {}

    def run(number: int, tenants: Sequence[int]) -> Any:
        forward = shifts.forward(tenants)

        def together(*args: Any) -> Any:
            barrier.wait(timeout=60)
            return forward(*args)

        plan = [profiles(settings)[each] for each in tenants]
        arguments = {**batch(base), "max_new_tokens": 12, "min_new_tokens": 12}
        found[number] = generate(base, together, plan, arguments)

    threads = [threading.Thread(target=run, args=each) for each in enumerate(plans)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for number, tenants in enumerate(plans):
        plan = [profiles(settings)[each] for each in tenants]
        arguments = {**batch(base), "max_new_tokens": 12, "min_new_tokens": 12}
        assert torch.equal(found[number], generate(base, shifts.forward(tenants), plan, arguments))


def test_the_base_is_left_as_it_was(made: Made) -> None:
    base = made()
    before = set(vars(base)), base.generation_config.to_dict(), type(base), list(base._modules)
    settings = configs(base, eos_token_id=[2, 3, 4])
    given = [config.to_dict() for config in settings]
    arguments = {**batch(base), "max_new_tokens": 3, "do_sample": True}
    generate(base, Shifts(base).forward([0, 1, 2]), profiles(settings), arguments)
    assert before == (set(vars(base)), base.generation_config.to_dict(), type(base), list(base._modules))
    assert given == [config.to_dict() for config in settings]


def test_static_caches_keep_their_greatest_length_from_call_to_call(made: Made) -> None:
    base = made()
    lengths = []
    for tokens in (9, 3):
        arguments = {**batch(base), "max_new_tokens": tokens, "cache_implementation": "static"}
        arguments["return_dict_in_generate"] = True
        found = generate(base, Shifts(base).forward([0, 1, 2]), profiles([None] * 3), arguments)
        lengths.append(found.past_key_values.layers[0].max_cache_len)
    assert lengths[0] == lengths[1]


def test_transformers_does_not_compile_the_decode_step_once_more(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    base = made()
    options = transformers.CompileConfig()
    options._compile_all_devices = True
    plan = profiles(configs(base, compile_config=[options] * 3))
    monkeypatch.setattr(type(base), "get_compiled_call", lambda *_: pytest.fail("compiled by transformers"))
    arguments = {**batch(base), "max_new_tokens": 3, "cache_implementation": "static"}
    assert generate(base, Shifts(base).forward([0, 1, 2]), plan, arguments).shape == (3, 9)


def test_a_forward_set_on_the_base_does_not_hide_the_tenants(made: Made) -> None:
    base = made()
    base.forward = base.forward
    shifts = Shifts(base)
    ids = batch(base)["input_ids"]
    view = view_of(Call(base, shifts.forward([0, 1, 2]), [], []))
    assert torch.equal(view.forward(input_ids=ids).logits, view(input_ids=ids).logits)
    assert [module for module, _ in shifts.calls] == [base, base]


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"custom_generate": "some/repo"}, "custom_generate"),
        ({"assistant_model": nn.Linear(1, 1)}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation.*prompt_lookup_num_tokens"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive search.*penalty_alpha"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group beam search.*num_beam_groups"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained beam search.*force_words_ids"),
        ({"dola_layers": "low"}, "dola generation.*dola_layers"),
        ({"token_healing": True}, "token_healing"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"compile_config": transformers.CompileConfig()}, "compile_config.*compiled already"),
        ({"disable_compile": False}, "disable_compile=False.*compiled already"),
        ({"generation_config": GenerationConfig(disable_compile=False)}, "disable_compile=False.*compiled already"),
    ],
)
def test_ways_of_generating_that_know_no_rows_are_refused_by_name(
    kwargs: dict[str, Any], message: str, made: Made
) -> None:
    base = made()
    arguments = {**batch(base), "max_new_tokens": 2, **kwargs}
    with pytest.raises(UnsupportedError, match=message):
        generate(base, Shifts(base).forward([0, 1, 2]), profiles([None] * 3), arguments)


def test_guidance_is_refused_for_rows_with_different_settings(made: Made) -> None:
    base = made()
    plan = profiles(configs(base, eos_token_id=[2, 3, 4]))
    arguments = {**batch(base), "max_new_tokens": 2, "guidance_scale": 2.0}
    with pytest.raises(UnsupportedError, match=r"guidance_scale.*separate calls"):
        generate(base, Shifts(base).forward([0, 1, 2]), plan, arguments)


def test_a_model_with_a_generate_of_its_own_is_refused(made: Made) -> None:
    class Own(transformers.LlamaForCausalLM):
        def generate(self, **kwargs: Any) -> Any:  # type: ignore[override]
            raise AssertionError

    base = made()
    base.__class__ = Own
    with pytest.raises(UnsupportedError, match=r"Own does not generate by transformers"):
        generate(base, Shifts(base).forward([0]), profiles([None]), {"input_ids": torch.tensor([[5]])})
    with pytest.raises(UnsupportedError, match=r"Linear does not generate by transformers"):
        generate(nn.Linear(1, 1), Shifts(base).forward([0]), profiles([None]), {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, r"2 rows, \(2, 3\), and tenants for 3"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"got shape \(3,\): pass input_ids="),
        ({"input_ids": [[1, 2]] * 3}, r"got <class .list.>: pass input_ids="),
        ({"attention_mask": torch.ones(3, 3)}, r"got none: pass input_ids="),
    ],
)
def test_inputs_that_do_not_fit_the_tenants(inputs: dict[str, Any], message: str, made: Made) -> None:
    base = made()
    with pytest.raises(BitDeltaError, match=message):
        generate(base, Shifts(base).forward([0, 1, 2]), profiles([None] * 3), {**inputs, "max_new_tokens": 2})
