"""Budgets: what is chosen from offers, what dropping a delta does, files that stay below what was asked for."""

from __future__ import annotations

import itertools
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitdelta_compile as bdc
from bitdelta_compile.compress.budget import Offer, choose, file_bytes
from bitdelta_compile.compress.settings import Allocation
from bitdelta_compile.errors import UnsupportedError

SAME, DENSE = Allocation("same"), Allocation("dense")


def ladder(scale: float, size: int) -> list[Offer]:
    planes = [Offer(Allocation(planes=p), p * size, scale * 0.1**p) for p in (1, 2, 3)]
    return [Offer(DENSE, 32 * size, 0.0), *planes, Offer(SAME, 0, scale)]


def damage(chosen: dict[str, Offer]) -> float:
    return sum(offer.damage for offer in chosen.values())


def test_what_matters_more_gets_more() -> None:
    chosen = choose({"a": ladder(1.0, 10), "b": ladder(1000.0, 10), "c": ladder(1e-9, 10)}, 40)
    assert [chosen[name].allocation for name in "abc"] == [Allocation(planes=1), Allocation(planes=3), SAME]


def test_an_offer_that_is_larger_and_no_better_is_never_taken() -> None:
    offers = [Offer(SAME, 0, 1.0), Offer(Allocation(planes=1), 10, 0.1), Offer(Allocation(planes=2), 20, 0.2)]
    assert choose({"a": offers}, 100)["a"].allocation == Allocation(planes=1)


def test_a_poor_offer_on_the_way_does_not_hide_a_good_one() -> None:
    poor, good = Offer(Allocation(planes=1), 10, 0.9), Offer(Allocation(planes=2), 20, 0.0)
    other = [Offer(SAME, 0, 0.3), Offer(Allocation(planes=1), 10, 0.0)]
    chosen = choose({"a": [Offer(SAME, 0, 1.0), poor, good], "b": other}, 20)
    assert (chosen["a"], chosen["b"]) == (good, other[0])


@pytest.mark.parametrize("room", [0, 7, 23, 60, 145, 400, 10_000])
def test_greedy_is_within_one_step_of_the_best_and_never_above_the_room(room: int) -> None:
    generator = torch.Generator().manual_seed(room)
    offers = {
        name: ladder(float(scale), int(size))
        for name, scale, size in zip(
            "abcd",
            torch.rand(4, generator=generator).mul(5).exp(),
            torch.randint(3, 20, (4,), generator=generator),
            strict=True,
        )
    }
    chosen = choose(offers, room)
    assert sum(offer.nbytes for offer in chosen.values()) <= room
    every = [dict(zip(offers, some, strict=True)) for some in itertools.product(*offers.values())]
    best = min(damage(some) for some in every if sum(offer.nbytes for offer in some.values()) <= room)
    # With room for one more of the largest steps that planes are, greedy does what the best does.
    wider = damage(choose(offers, room + 20))
    assert best - 1e-12 <= damage(chosen)
    assert wider <= best + 1e-12 or room + 20 < 3 * 60


def test_choice_does_not_depend_on_order() -> None:
    offers = {name: ladder(1.0, 10) for name in "abcd"}
    backwards = {name: list(reversed(offers[name])) for name in reversed(offers)}
    assert choose(offers, 30) == choose(backwards, 30)


def test_too_little_room() -> None:
    with pytest.raises(ValueError, match="take 5 bytes, and there is room for 4"):
        choose({"a": [Offer(DENSE, 5, 0.0)]}, 4)


class Output:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden


class Two(nn.Module):
    """A matrix that decides the output and one that hardly reaches it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.loud, self.quiet = (nn.Parameter(torch.randn(96, 96, generator=generator)) for _ in range(2))

    def forward(self, x: Tensor) -> Output:
        return Output(F.linear(x, self.loud) + 1e-3 * F.linear(x, self.quiet))


@pytest.fixture(scope="module")
def two() -> tuple[Two, Two, list[dict[str, Tensor]]]:
    base, tuned = Two(0), Two(0)
    with torch.no_grad():
        for place, parameter in enumerate(tuned.parameters()):
            parameter += 0.05 * torch.randn(96, 96, generator=torch.Generator().manual_seed(place + 7))
    return base, tuned, [{"x": torch.randn(64, 96, generator=torch.Generator().manual_seed(3))}]


@pytest.mark.parametrize("max_bytes", [6_000, 9_000, 11_000])
def test_the_file_stays_below_the_budget_and_planes_go_where_the_output_is(
    two: tuple[Two, Two, list[dict[str, Tensor]]], max_bytes: int, tmp_path: Path
) -> None:
    delta = bdc.compress(two[0], two[1], two[2], max_bytes=max_bytes)
    delta.save(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size == file_bytes(delta) <= max_bytes
    assert delta.encodings["quiet"].nbytes < delta.encodings["loud"].nbytes
    assert delta.options["max_bytes"] == max_bytes
    bdc.compress(two[0], two[1], two[2], max_bytes=max_bytes).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_more_bytes_lose_less(two: tuple[Two, Two, list[dict[str, Tensor]]]) -> None:
    base, tuned, batches = two
    expected = tuned(**batches[0]).last_hidden_state.detach()
    lost = []
    for max_bytes in (4_000, 6_000, 9_000, 14_000, 80_000, 200_000):
        values = dict(bdc.compress(base, tuned, batches, max_bytes=max_bytes).materialize(base))
        found = torch.func.functional_call(base, values, kwargs=batches[0]).last_hidden_state.detach()
        lost.append(float((found - expected).norm()))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 1e-4 < 1e-2 * lost[0]


def test_bits_are_of_the_file_per_weight_of_the_model(llama_pair: Any) -> None:
    base, tuned = llama_pair.base, llama_pair.tuned
    texts = ["the language is a value of python and it is to be", "python is not the language that it is for a value"]
    whole = bdc.compress(base, tuned, texts)
    weights = sum(prod(encoding.shape) for encoding in whole.encodings.values())
    bits = 8 * file_bytes(whole) / weights - 0.3
    delta = bdc.compress(base, tuned, texts, bits=bits)
    assert 0.9 * bits < 8 * file_bytes(delta) / weights <= bits
    assert {encoding.kind for encoding in delta.encodings.values()} >= {"same", "sign", "dense"}


def test_an_interrupted_budget_goes_on_and_gives_the_same(
    two: tuple[Two, Two, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        bdc.compress(*two, max_bytes=7_000, work_dir=tmp_path / "work").save(tmp_path / name)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["budget-0"]  # what was chosen did fit
    bdc.compress(*two, max_bytes=7_000).save(tmp_path / "third")
    contents = [(tmp_path / name).read_bytes() for name in ("first", "second", "third")]
    assert contents[0] == contents[1] == contents[2]


def test_a_budget_that_nothing_fits_in_names_the_smallest(two: tuple[Two, Two, list[dict[str, Tensor]]]) -> None:
    with pytest.raises(UnsupportedError, match=r"fits in 100 bytes: the smallest takes \d+") as caught:
        bdc.compress(*two, max_bytes=100)
    least = int(str(caught.value).rpartition("=")[2])
    assert file_bytes(bdc.compress(*two, max_bytes=least)) <= least
    with pytest.raises(UnsupportedError, match="smallest"):
        bdc.compress(*two, max_bytes=least - 200)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 1.0, "max_bytes": 10}, "give one of them"),
        ({"bits": 0.0}, "bits must be a number above 0"),
        ({"max_bytes": -1}, "max_bytes must be a number above 0"),
        ({"bits": 1.0, "allocation": {"loud": SAME}}, "either allocation, or bits"),
    ],
)
def test_options_that_contradict(
    options: dict[str, Any], said: str, two: tuple[Two, Two, list[dict[str, Tensor]]]
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        bdc.compress(*two, **options)


def test_outputs_that_say_nothing_are_refused() -> None:
    class Pair(Two):
        def forward(self, x: Tensor) -> Any:
            return [super().forward(x).last_hidden_state]

    base, tuned = Pair(0), Pair(1)
    with torch.no_grad():
        for ours, theirs in zip(base.parameters(), tuned.parameters(), strict=True):
            theirs.copy_(ours + 0.05 * theirs)
    with pytest.raises(UnsupportedError, match="neither logits nor hidden states"):
        bdc.compress(base, tuned, [{"x": torch.randn(8, 96)}], max_bytes=9_000)
