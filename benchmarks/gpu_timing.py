"""What every GPU case needs: the device or a clean refusal, cold data, CUDA graphs timed by events, a limit on time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch

from .registry import SkippedError
from .timing import side_by_side

Item = TypeVar("Item")


def device() -> torch.device:
    """The CUDA device; SkippedError where there is none, or no triton to compile for it."""
    if not torch.cuda.is_available():
        raise SkippedError("needs a CUDA device")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise SkippedError(f"needs triton ({error})") from error
    return torch.device("cuda", torch.cuda.current_device())


def cold_copies(nbytes: int, cache: int, least: int = 1) -> int:
    """How many distinct sets of `nbytes` to cycle through so that each is out of a cache of `cache` bytes when met."""
    return max(least, math.ceil(2.5 * cache / max(1, nbytes)) + 1)


def l2_bytes(where: torch.device) -> int:
    return int(torch.cuda.get_device_properties(where).L2_cache_size)


def events(way: Callable[[], object]) -> float:
    """Seconds of one call by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def captured(way: Callable[[], object], warmup: int = 2) -> Callable[[], object]:
    """`way` as a CUDA graph: what it launches without what it costs the host to launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            way()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    replay: Callable[[], object] = graph.replay
    return replay


def graph_seconds(
    ways: Mapping[str, tuple[Callable[[], object], int]], *, repeats: int, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of each way's one unit of work, all in turns.

    Args:
        ways: name -> (call, how many units of work a call does). A call cycles through cold data itself.
    """
    graphs = {name: captured(way) for name, (way, _) in ways.items()}
    seconds = side_by_side(graphs, repeats=repeats, warmup=warmup, clock=events)
    return {name: value / ways[name][1] for name, value in seconds.items()}


def within(items: Iterable[Item], seconds: float, now: Callable[[], float] = time.monotonic) -> Iterator[Item]:
    """The items until the time is up; the first always. Says how many are left out: put what matters first."""
    kept, start = list(items), now()
    for index, item in enumerate(kept):
        if index and now() - start > seconds:
            print(f"  {len(kept) - index} of {len(kept)} settings left out: {seconds:.0f} s are up")
            return
        yield item
