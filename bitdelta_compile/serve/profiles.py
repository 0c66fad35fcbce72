"""Whose row is whose in one `generate` call, and which generation settings may differ between the rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from ..errors import UnsupportedError

# Settings that transformers reads in logits processors, in stopping criteria and for special tokens, all of which work
# row by row. Every other setting steers the loop that the rows share.
PER_ROW = frozenset(
    {
        *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "stop_strings"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
        *("remove_invalid_values", "renormalize_logits", "watermarking_config"),
    }
)
# Settings that nothing here reads: compilation is this package's, and assisted generation is refused.
_UNUSED = frozenset(
    {
        *("transformers_version", "compile_config", "disable_compile", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    }
)


@dataclass(frozen=True)
class Profile:
    """One input row of a `generate` call.

    name: the tenant, None for the base.
    generation_config: the tenant's own, as its delta carries it; None: the base's.
    """

    name: str | None
    generation_config: GenerationConfig | None = None

    def __str__(self) -> str:
        return "the base" if self.name is None else f"tenant {self.name!r}"


@dataclass
class Group:
    """Input rows with equal per-row settings, and those settings as transformers resolved them for this call."""

    rows: list[int]
    config: GenerationConfig


def grouped(
    profiles: Sequence[Profile], configs: Sequence[GenerationConfig], explicit: Mapping[str, Any]
) -> list[Group]:
    """The rows by equal per-row settings, in order of first appearance.

    profiles: each with the generation config of its own; configs: those, resolved for this call; explicit: what the
        caller gave, for all rows.

    Raises:
        UnsupportedError: a setting of the shared loop differs between two rows.
    """
    settings = [_settings(config) for config in configs]
    loops = [_loop(profile, found, explicit) for profile, found in zip(profiles, settings, strict=True)]
    for profile, loop in zip(profiles, loops, strict=True):
        for field in sorted(loops[0].keys() & loop.keys()):
            one, other = loops[0][field], loop[field]
            if one != other:
                raise UnsupportedError(
                    f"The generation setting {field} steers all rows of a call at once and differs between them: "
                    f"{one!r} for {profiles[0]}, {other!r} for {profile}. Pass {field}=... to generate, for all rows, "
                    "or generate for these tenants in separate calls."
                )
    groups: list[tuple[dict[str, Any], Group]] = []
    for row, (found, config) in enumerate(zip(settings, configs, strict=True)):
        own = {field: found.get(field) for field in PER_ROW}
        group = next((group for key, group in groups if key == own), None)
        if group is None:
            groups.append((own, Group([row], config)))
        else:
            group.rows.append(row)
    return [group for _, group in groups]


def merged(shared: GenerationConfig, group: Group) -> Any:
    """The settings of the loop, as transformers has prepared them, with the group's own in their place."""
    config: Any = copy.copy(shared)
    for field in (*PER_ROW, "_eos_token_tensor", "_pad_token_tensor"):
        if hasattr(group.config, field):
            setattr(config, field, getattr(group.config, field))
    return config


def _settings(config: GenerationConfig) -> dict[str, Any]:
    # Entries of a checkpoint's own, which transformers keeps beside its settings, steer nothing.
    known = [field for field in vars(GenerationConfig()) if not field.startswith("_") and field not in _UNUSED]
    return {field: _plain(getattr(config, field)) for field in known}


def _plain(value: Any) -> Any:
    # A watermarking config compares equal to any other of its kind, tensors do not compare to one truth.
    if isinstance(value, Tensor):
        return value.tolist()
    return value.to_dict() if hasattr(value, "to_dict") else value


def _loop(profile: Profile, settings: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the shared loop that matter for this call."""
    loop = {field: value for field, value in settings.items() if field not in PER_ROW}
    if loop.get("num_beams") == 1:
        del loop["early_stopping"], loop["length_penalty"]
    if loop.get("min_new_tokens") is not None:
        del loop["min_length"]
    if loop.get("max_new_tokens") is not None:
        del loop["max_length"]
    elif explicit.get("max_length") is None:
        # Unset, it means so many new tokens; set to the same number, it counts the prompt as well.
        loop["max_length"] = getattr(profile.generation_config, "max_length", None)
    return loop
