"""Peak anonymous memory and seconds of `best` on synthetic Llama checkpoints, by number of layers.

Both checkpoints are written tensor by tensor, then compressed in a process of its own, which samples its RssAnon (files
that are mapped not counted). The statistics of the widest matrix, H, its drift, factor and shift, are the part that
does not depend on the number of layers. CPU seconds are those of all threads: load on the machine hardly changes them.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bitdelta_compile.fileformat import TensorSpec, write_safetensors

from .registry import Record, Run, case, require

STATISTICS = 5  # fp32 [K, K] matrices that are alive at once where the metric is made

CHILD = """
import json, sys, threading, time, torch
import transformers
from bitdelta_compile.compress import compress

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) * 1024

base, tuned, tokens, vocabulary, small_base, small_tuned = sys.argv[1:]
ids = torch.randint(int(vocabulary), (int(tokens) // 128, 128), generator=torch.Generator().manual_seed(0))
batches = [{"input_ids": part} for part in ids.split(4)]
compress(small_base, small_tuned, batches[:1])  # warm: code, pools, caches
start = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.02)
thread = threading.Thread(target=watch)
thread.start()
begin, cpu = time.perf_counter(), time.process_time()
delta = compress(base, tuned, batches)
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
done = True
thread.join()
kinds = [encoding.kind for encoding in delta.encodings.values()]
signs = kinds.count("sign")
print(json.dumps({"peak": peak - start, "seconds": seconds, "cpu_seconds": cpu, "signs": signs}))
"""


def write_pair(folder: Path, layers: int, width: int, inner: int, vocabulary: int) -> tuple[Path, Path, int]:
    """A random bf16 checkpoint and one that moved from it by a hundredth, and the bytes of one."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    model.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def values(place: int, shape: tuple[int, ...], moved: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(place)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        found = torch.randn(shape, generator=generator).div_(shape[1] ** 0.5)
        if moved:
            found += torch.randn(shape, generator=generator).mul_(0.01 * shape[1] ** -0.5)
        return found.bfloat16()

    for name, moved in (("base", False), ("tuned", True)):
        (folder / name).mkdir(parents=True)
        config.save_pretrained(folder / name)
        specs = [
            TensorSpec(key, torch.bfloat16, shape, functools.partial(values, place, shape, moved))
            for place, (key, shape) in enumerate(shapes.items())
        ]
        write_safetensors(folder / name / "model.safetensors", specs, {"format": "pt"})
    return folder / "base", folder / "tuned", (folder / "base" / "model.safetensors").stat().st_size


@case(
    "compress-memory",
    "peak anonymous memory and seconds of quality best, by number of layers",
    columns=(
        "layers",
        "weights",
        "tuned_bytes",
        "statistics_bytes",
        "peak_bytes",
        "share",
        "seconds",
        "cpu_seconds",
        "ns_per_weight",
    ),
)
def measure(run: Run) -> list[Record]:
    width, inner, vocabulary, tokens = (256, 512, 512, 512) if run.quick else (2048, 5632, 32000, 2048)
    records: list[Record] = []
    for layers in (1, 2) if run.quick else (5, 20):
        with tempfile.TemporaryDirectory() as scratch:
            base, tuned, size = write_pair(Path(scratch) / "pair", layers, width, inner, vocabulary)
            small = write_pair(Path(scratch) / "small", 1, 64, 128, 512)
            command = [base, tuned, tokens, min(512, vocabulary), *small[:2]]
            found = subprocess.run(
                [sys.executable, "-c", CHILD, *map(str, command)], capture_output=True, text=True, check=False
            )
            require(found.returncode == 0, f"the compression failed: {found.stderr[-300:]}")
            result = json.loads(found.stdout.splitlines()[-1])
        require(result["signs"] == 7 * layers + 1, "some matrix has no sign planes")
        statistics = STATISTICS * 4 * inner * inner
        records.append(
            {
                "layers": layers,
                "weights": size // 2,
                "tokens": tokens,
                "tuned_bytes": size,
                "statistics_bytes": statistics,
                "peak_bytes": result["peak"],
                "share": (result["peak"] - statistics) / size,
                "seconds": result["seconds"],
                "cpu_seconds": result["cpu_seconds"],
                "ns_per_weight": 1e9 * result["cpu_seconds"] / (size // 2),
            }
        )
    return records
