"""generate of an attached model: rows of three tenants and the base against their dense models alone, in fp32."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bitdelta_compile as bdc

PROMPTS = ([7, 8, 9, 10, 11, 12], [13, 14, 15], [16, 17, 18, 19], [20, 21])
NAMES = ("sre", None, "legal", "code")
NEW = 12


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def fine_tuned(base: Any, seed: int) -> Any:
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * (parameter.std() if parameter.std() > 0 else 0.5) * noise
    return tuned


class Tenants:
    """A base with three tenants, and each tenant's dense model; every one ends at a token that it does generate."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.base.generation_config.pad_token_id = 53
        self.dense = {None: copy.deepcopy(self.base)}
        deltas = {}
        for seed, name in enumerate(("sre", "legal", "code")):
            tuned = fine_tuned(self.base, seed)
            delta = bdc.compress(self.base, tuned, tokens=256)
            with torch.no_grad():
                for key, value in delta.materialize(self.base, dtype=torch.float32):
                    tuned.get_parameter(key).copy_(value)
            row = NAMES.index(name)
            free = self.alone(tuned, row, eos_token_id=None, max_new_tokens=NEW)
            tuned.generation_config.eos_token_id = [free[3 * seed], 58]
            tuned.generation_config.pad_token_id = 50 + seed
            stored = tuned.generation_config.to_diff_dict()
            files = {**delta.side_files, "generation_config.json": stored}
            deltas[name] = dataclasses.replace(delta, side_files=files)
            self.dense[name] = tuned
        self.model = bdc.attach(self.base, deltas, lower="eager")

    @property
    def seq2seq(self) -> bool:
        return bool(self.base.config.is_encoder_decoder)

    def inputs(self, rows: Sequence[int] = range(4)) -> dict[str, Tensor]:
        length = max(len(PROMPTS[row]) for row in rows)
        ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
        for at, row in enumerate(rows):
            prompt = PROMPTS[row]
            place = slice(0, len(prompt)) if self.seq2seq else slice(length - len(prompt), None)
            ids[at, place], mask[at, place] = torch.tensor(prompt), 1
        return {"input_ids": ids, "attention_mask": mask}

    def alone(self, model: Any, row: int, **kwargs: Any) -> Any:
        """New tokens of the row's prompt, unpadded, from a dense model."""
        found = model.generate(**self.inputs([row]), **kwargs)
        start = 1 if self.seq2seq else len(PROMPTS[row])
        return found[:, start:].tolist()[0] if isinstance(found, Tensor) else found

    def check(self, found: Tensor, rows: Sequence[int] = range(4), **kwargs: Any) -> None:
        """Each row's tokens are its dense model's, then its own padding."""
        new = found[:, 1 if self.seq2seq else self.inputs(rows)["input_ids"].shape[1] :].tolist()
        expected = [self.alone(self.dense[NAMES[row]], row, **kwargs) for row in rows]
        for tokens, exact, row in zip(new, expected, rows, strict=True):
            pad = self.dense[NAMES[row]].generation_config.pad_token_id
            assert tokens == exact + [pad] * (max(map(len, expected)) - len(exact)), NAMES[row]


@pytest.fixture(scope="module")
def tenants_of(made: Callable[[str], Any]) -> Callable[[str], Tenants]:
    return functools.cache(lambda kind: Tenants(made(kind)))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5"])
def test_greedy_tokens_and_logits_are_those_of_dense_models_alone(
    tenants_of: Callable[[str], Tenants], kind: str
) -> None:
    tenants = tenants_of(kind)
    kwargs = {"max_new_tokens": NEW}
    for rows in ((0, 1, 2, 3), (3, 0)):
        names = [NAMES[row] for row in rows]
        tenants.check(tenants.model.generate(**tenants.inputs(rows), tenants=names, **kwargs), rows, **kwargs)
    kwargs |= {"return_dict_in_generate": True, "output_logits": True, "min_new_tokens": NEW}
    found = tenants.model.generate(**tenants.inputs(), tenants=list(NAMES), **kwargs)
    for row, name in enumerate(NAMES):
        exact = torch.stack(tenants.alone(tenants.dense[name], row, **kwargs).logits)[:, 0]
        logits = torch.stack(found.logits)[:, row]
        plain = torch.stack(tenants.alone(tenants.dense[None], row, **kwargs).logits)[:, 0]
        assert name is None or (exact[0] - plain[0]).norm() > 0.02 * plain[0].norm()
        torch.testing.assert_close(logits, exact, atol=3e-5 * float(exact.abs().max()), rtol=1e-4)


def test_beams_samples_and_static_caches_go_through_the_same_graphs(tenants_of: Callable[[str], Tenants]) -> None:
    tenants = tenants_of("llama")
    names = list(NAMES)
    for kwargs in ({"num_beams": 3}, {"cache_implementation": "static"}):
        kwargs["max_new_tokens"] = NEW
        found = tenants.model.generate(**tenants.inputs(), tenants=names, **kwargs)
        tenants.check(found, **kwargs)
    sampling = {"max_new_tokens": NEW, "do_sample": True, "temperature": 2.0}
    generators = [torch.Generator().manual_seed(row) for row in range(4)]
    found = tenants.model.generate(**tenants.inputs(), tenants=names, generators=generators, **sampling)
    for row, name in enumerate(NAMES):
        torch.manual_seed(row)
        exact = tenants.alone(tenants.dense[name], row, **sampling)
        assert found[row, 6 : 6 + len(exact)].tolist() == exact
    before = tenants.model._graphs.graphs
    tenants.model.generate(**tenants.inputs((2, 1, 0, 3)), tenants=["legal", "legal", "sre", None], max_new_tokens=NEW)
    assert tenants.model._graphs.graphs == before
