"""Named tensors of a model, wherever it lives: a module, a checkpoint folder (mapped, not read), or a hub id."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import BaseMismatchError, CheckpointError
from .fileformat import FormatError, load_pickle, map_tensors, read_header
from .quantized import parts, values

__all__ = ["SIDE_FILES", "Checkpoint", "match_names", "open_checkpoint"]

log = logging.getLogger(__name__)

# What travels with the weights. Nothing outside this list is read from a checkpoint folder or written to one.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "modules.json",  # this and the following: sentence-transformers
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


class Checkpoint:
    """Uniform read access to a model's tensors.

    Attributes:
        source: where it came from, for messages.
        tied: alias -> canonical name, for tensors that share one storage. The canonical name is the first one stored.
        side_files: parsed JSON, or text, by file name (those of `SIDE_FILES` that exist).
    """

    def __init__(
        self,
        source: str,
        tensors: Mapping[str, Tensor],
        side_files: Mapping[str, object] | None = None,
        buffers: Iterable[str] = (),
    ) -> None:
        """Args:
        source: for messages.
        tensors: by name in stored order; tensors that are one view of one storage become canonical name and aliases.
        side_files: by file name.
        buffers: names in `tensors` of persistent buffers, where known.
        """
        self.source = source
        self.side_files: dict[str, object] = dict(side_files or {})
        self.tied: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        self._buffers = tuple(buffers)
        first: dict[object, str] = {}
        for name, tensor in tensors.items():
            canonical = first.setdefault(_identity(tensor), name)
            if canonical == name:
                self._tensors[name] = tensor.detach()
            else:
                self.tied[name] = canonical

    def names(self) -> list[str]:
        """Canonical names in stored order; aliases are in `tied`."""
        return list(self._tensors)

    def buffers(self) -> list[str]:
        """Canonical names of persistent buffers: known for modules, empty for files."""
        return [name for name in self._buffers if name in self._tensors]

    def tensor(self, name: str) -> Tensor:
        """The tensor itself (canonical name or alias): mapped for files, the live one for modules. Do not write to it.

        A quantized one gives its values, made anew by each call.

        Raises:
            CheckpointError: no such name.
        """
        return values(self.held(name))

    def held(self, name: str) -> Tensor:
        """As `tensor`, but a quantized one comes as the module holds it."""
        try:
            return self._tensors[self.tied.get(name, name)]
        except KeyError:
            raise CheckpointError(f"{self.source} has no tensor named {name!r}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.held(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.held(name).dtype

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self.tied

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self._tensors)} tensors)"


def _identity(tensor: Tensor) -> object:
    """Equal for two tensors exactly when they are the same view of the same storage."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    inner = parts(tensor)
    if inner[0] is not tensor:  # a wrapper has no memory of its own
        return tuple(map(_identity, inner))
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def open_checkpoint(source: nn.Module | str | Path) -> Checkpoint:
    """Open a model for reading.

    Args:
        source: a module; a folder with `model.safetensors` or `pytorch_model.bin`, whole or sharded; a hub id.

    Raises:
        CheckpointError: no weights there, a file that is malformed or missing, or a hub id that cannot be fetched.
    """
    if isinstance(source, nn.Module):
        return _open_module(source)
    folder = Path(source)
    if folder.is_dir():
        return _open_folder(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the checkpoint folder it lies in")
    if isinstance(source, Path) or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    return _open_folder(_download(source))


def _open_module(module: nn.Module) -> Checkpoint:
    kind = type(module).__name__
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    floating = Counter(parameter.dtype for parameter in tensors.values() if parameter.is_floating_point())
    state = module.state_dict(keep_vars=True)
    buffers = [name for name, value in state.items() if isinstance(value, Tensor) and name not in tensors]
    tensors |= {name: state[name] for name in buffers}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} of {kind} is on the meta device, without values: load the weights first")
    side_files: dict[str, object] = {}
    for file, attribute in (("config.json", "config"), ("generation_config.json", "generation_config")):
        to_json = getattr(getattr(module, attribute, None), "to_json_string", None)
        if to_json is not None:
            side_files[file] = json.loads(to_json())
    if isinstance(config := side_files.get("config.json"), dict):  # as save_pretrained would record them
        config["architectures"] = [kind]
        if floating:
            config["dtype"] = str(floating.most_common(1)[0][0]).removeprefix("torch.")
    return Checkpoint(kind, tensors, side_files, buffers)


def _open_folder(folder: Path) -> Checkpoint:
    for name, read in (("model.safetensors", _map_file), ("pytorch_model.bin", _load_pickle)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            tensors = read(folder / name)
        elif index.is_file():
            tensors = {}
            for shard in _shards(index):
                tensors.update(read(folder / shard))
        else:
            continue
        return Checkpoint(str(folder), tensors, _read_side_files(folder))
    raise CheckpointError(f"{folder} holds no model.safetensors and no pytorch_model.bin, whole or with an index")


def _shards(index: Path) -> list[str]:
    """The file names that an index lists, in order of first mention; only names within the folder are accepted."""
    table = _read_json(index)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if os.path.basename(shard) != shard or not (index.parent / shard).is_file():
            raise CheckpointError(
                f"{index} lists {shard!r}, which is not a file of that folder: fetch the missing shard"
            )
    return shards


def _map_file(path: Path) -> dict[str, Tensor]:
    try:
        return map_tensors(path, read_header(path))
    except FormatError as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from None


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = load_pickle(path)
    except FormatError as error:
        raise CheckpointError(f"{path} is not a checkpoint that loads with weights_only=True: {error}") from error
    if found is None:
        raise CheckpointError(f"{path} is not a table of tensors by name: save the model's state_dict")
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable text: {error}") from None


def _read_json(path: Path) -> object:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None


def _read_side_files(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in SIDE_FILES:
        path = folder / name
        if path.is_file():
            found[name] = _read_json(path) if name.endswith(".json") else _read_text(path)
    return found


def _download(repository: str) -> Path:
    """The local snapshot folder of a hub id; pickles are fetched only where there are no safetensors."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*weights: str) -> Path:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=[*weights, *SIDE_FILES]))

    try:
        folder = fetch("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
        if not any(folder.glob("model*.safetensors")):
            folder = fetch("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        message = f"{repository!r} is neither a folder nor a model that can be fetched from the hub: {reason}"
        raise CheckpointError(message) from error
    return folder


def match_names(wanted: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """Pair two models' names for the same parameters.

    A model with a head and its bare body differ by a prefix (`bert.`, `model.`) that one side has throughout. The
    one reading (same names, or one prefix added, or one removed) that pairs the most names is taken for the whole
    set; names it leaves over are paired if they are the same on both sides.

    Returns:
        wanted name -> available name; names without a partner are left out.

    Raises:
        BaseMismatchError: two readings pair equally many names differently.
    """
    wanted, there = list(dict.fromkeys(wanted)), set(available)
    readings: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    readings["same", ""] = {name: name for name in wanted if name in there}
    if len(readings["same", ""]) == len(wanted):
        return readings["same", ""]
    ends = defaultdict(list)
    for name in there:
        for prefix in _prefixes(name):
            ends[name[len(prefix) :]].append(prefix)
    for name in wanted:
        for prefix in ends[name]:
            readings["added", prefix][name] = prefix + name
        for prefix in _prefixes(name):
            if name[len(prefix) :] in there:
                readings["removed", prefix][name] = name[len(prefix) :]
    ranked = sorted(readings.items(), key=lambda item: (-len(item[1]), item[0][0] != "same", item[0]))
    (kind, prefix), best = ranked[0]
    if kind != "same" and len(ranked) > 1 and len(ranked[1][1]) == len(best):
        (other_kind, other), _ = ranked[1]
        raise BaseMismatchError(
            f"{len(best)} parameter names can be paired in two ways, with the prefix {prefix!r} {kind} "
            f"or with {other!r} {other_kind}: rename the parameters of one side"
        )
    taken = set(best.values())
    return {name: best.get(name, name) for name in wanted if name in best or (name in there and name not in taken)}


def _prefixes(name: str) -> list[str]:
    """Every proper prefix of a dotted name that ends in a dot."""
    return [name[: position + 1] for position, letter in enumerate(name[:-1]) if letter == "."]
