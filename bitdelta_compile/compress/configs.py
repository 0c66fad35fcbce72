"""Refusing a base whose graph differs: weights that fit it would still compute something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import BaseMismatchError

# Keys that say where a model came from, how it is trained, or how its text is cut and generated, not what it computes.
# Sizes of tables that may grow (vocabulary, positions, labels) are seen in the tables' own shapes.
_IRRELEVANT = re.compile(
    r"_.*|.*drop.*|.*_token_id|.*_tokens|initializer_.*|output_.*|num_(labels|beams|beam_groups|return_sequences)"
    r"|name_or_path|architectures|transformers_version|(torch_)?dtype|auto_map|trust_remote_code|quantization_config"
    r"|model_max_length|tokenizer_class|vocab_size|max_position_embeddings|n_positions|n_ctx|use_cache"
    r"|cache_implementation|return_dict.*|torchscript|tf_legacy_loss|use_bfloat16|pretraining_tp"
    r"|id2label|label2id|problem_type|finetuning_task|task_specific_params|prefix|gradient_checkpointing"
    r"|chunk_size_feed_forward|max_length|min_length|do_sample|early_stopping|diversity_penalty|temperature|top_[kp]"
    r"|typical_p|repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size|bad_words_ids|remove_invalid_values"
    r"|exponential_decay_length_penalty"
)


def _complete(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its class's defaults filled in, so that files of different transformers versions compare."""
    from transformers import CONFIG_MAPPING

    try:
        found: dict[str, Any] = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw)).to_dict()
    except Exception:  # a type transformers does not know, or a file it cannot read: the file's own keys are compared
        return dict(raw)
    return found


def differences(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Graph-relevant settings that differ: name -> (base's, tuned's). Nested configs have dotted names."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*base, *tuned}):
        ours, theirs = base.get(key), tuned.get(key)
        if _IRRELEVANT.fullmatch(key) or ours == theirs:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            inner = differences(ours, theirs)
            found |= {f"{key}.{name}": values for name, values in inner.items()}
        else:
            found[key] = (ours, theirs)
    return found


def check_configs(base: Checkpoint, tuned: Checkpoint) -> None:
    """Compare the two `config.json`, where both sides have one.

    Raises:
        BaseMismatchError: naming the settings that differ.
    """
    ours, theirs = (side.side_files.get("config.json") for side in (base, tuned))
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return
    if ours.get("model_type") == theirs.get("model_type"):
        ours, theirs = _complete(ours), _complete(theirs)
    found = differences(ours, theirs)
    if found:
        listed = "; ".join(f"{key} is {a!r} in the base and {b!r} in the tuned model" for key, (a, b) in found.items())
        raise BaseMismatchError(
            f"{tuned.source} does not compute what {base.source} computes: {listed}; give its own base"
        )


def check_buffers(base: nn.Module, tuned: nn.Module, names: Mapping[str, str]) -> None:
    """Compare the buffers of two modules, persistent or not; `names` maps tuned names to base names.

    Raises:
        BaseMismatchError: naming the first buffer that differs.
    """
    ours = dict(base.named_buffers())
    for name, theirs in tuned.named_buffers():
        mine = ours.get(names.get(name, name))
        if mine is None:
            continue
        coarse = min(mine.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)  # a cast model's buffers are cast too
        same = mine.shape == theirs.shape and torch.equal(mine.to(theirs.device, coarse), theirs.to(coarse))
        if not same:
            raise BaseMismatchError(
                f"buffer {name} differs between base and tuned model; buffers are part of the graph and a delta cannot "
                "carry them: give the tuned model's own base"
            )
