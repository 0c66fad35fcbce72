"""`generate` for rows of several tenants: transformers' own loops, every model call through the tenants' graph.

Settings that differ between the rows of one call are each tenant's own where transformers reads them row by row
(`profiles.PER_ROW`: end, padding and start tokens, stop strings, `do_sample` and all that processes logits). Where one
value steers all rows (lengths, beams, caches, outputs) they must agree or be given to the call.

As in transformers, left padding counts as prompt where a setting counts or looks at the prompt (`max_length`,
`min_length`, bans of n-grams and, in its older versions, the repetition penalty).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from ..errors import BitDeltaError, UnsupportedError
from .profiles import Group, Profile, grouped
from .sampling import seeded, streams
from .view import Call, Forward, view_of

__all__ = ["Forward", "Profile", "generate"]

_OTHER_MODES = {
    GenerationMode.ASSISTED_GENERATION: "prompt_lookup_num_tokens, assistant_early_exit or use_mtp",
    GenerationMode.CONTRASTIVE_SEARCH: "penalty_alpha",
    GenerationMode.DOLA_GENERATION: "dola_layers",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "constraints or force_words_ids",
    GenerationMode.GROUP_BEAM_SEARCH: "num_beam_groups",
}
_WAY_OUT = "or generate with the tenant's dense model (delta.materialize)"


def generate(
    base: PreTrainedModel,
    forward: Forward,
    profiles: Sequence[Profile],
    kwargs: Mapping[str, Any],
    *,
    generators: Sequence[torch.Generator] | None = None,
) -> Any:
    """`base.generate(**kwargs)`, row i of the inputs by the tenant of profiles[i] with that tenant's settings.

    The greedy tokens of a row are those that the tenant's dense model gives alone with its own generation config. A row
    that ends before others is filled with its own pad token. Results, scores and logits included, are transformers'.

    forward: runs the base, or a submodule of it, for a batch whose entry i of R * n belongs to input row i // n.
    kwargs: what `base.generate` takes, the inputs among it.
    generators: where rows sample, one per input row on the inputs' device; None: seeded from torch's default generator.
        A row draws the tokens that its dense model draws alone under `torch.manual_seed(seed)`, its generator seeded
        alike. Return sequences and beams draw from streams derived from the row's generator.

    Raises:
        BitDeltaError: rows, profiles and generators do not match, or there are no inputs.
        UnsupportedError: a way of generating, or settings that differ between rows, that cannot be served per row.
    """
    _check_arguments(base, kwargs)
    inputs = _inputs(base, kwargs)
    if inputs.shape[0] != len(profiles):
        raise BitDeltaError(
            f"generate got inputs of {inputs.shape[0]} rows, {tuple(inputs.shape)}, and tenants for {len(profiles)}: "
            "name one tenant, or None for the base, per input row (beams and return sequences are no rows of their own)"
        )
    profiles = [replace(each, generation_config=each.generation_config or base.generation_config) for each in profiles]
    groups = _groups(base, profiles, kwargs)
    view = view_of(Call(base, forward, groups, _generators(groups, inputs, generators)))
    view.generation_config = copy.deepcopy(profiles[0].generation_config)
    # The forward is compiled already, for prefill and decoding alike.
    view.generation_config.disable_compile, view.generation_config.compile_config = True, None
    try:
        return view.generate(**kwargs)
    finally:
        # transformers makes a static cache as long as any before it, so that its shape settles.
        length = max(getattr(each, "_previous_max_cache_length", -1) for each in (view, base))
        if length >= 0:
            setattr(base, "_previous_max_cache_length", length)  # noqa: B010 - not an attribute that the class declares


def _check_arguments(base: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    if getattr(type(base), "generate", None) is not GenerationMixin.generate:
        raise UnsupportedError(
            f"{type(base).__name__} does not generate by transformers' GenerationMixin.generate, the only loop that is "
            f"served with tenants. Call the attached model in a loop of your own, {_WAY_OUT}"
        )
    for name, reason in {
        "custom_generate": "it replaces the loop in which the rows' tenants are known",
        "assistant_model": "it runs a second model, which knows no tenants",
    }.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"generate cannot take {name} with tenants: {reason}. Leave it out, {_WAY_OUT}")
    if kwargs.get("cache_implementation") == "paged":
        raise UnsupportedError(
            "generate cannot take cache_implementation='paged' with tenants: continuous batching packs all rows into "
            "one. Use 'dynamic' or 'static'"
        )
    given = kwargs.get("generation_config") or GenerationConfig()
    if kwargs.get("compile_config", given.compile_config) is not None or (
        kwargs.get("disable_compile", given.disable_compile) is False
    ):
        raise UnsupportedError(
            "generate cannot take compile_config, or disable_compile=False, with tenants: an attached model is "
            "compiled already, for prefill and decoding alike. Give the compiler's options to attach"
        )


def _inputs(base: PreTrainedModel, kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor whose first dimension counts the rows."""
    encoder = getattr(base, "encoder", None)
    names = ["inputs", base.main_input_name, getattr(encoder, "main_input_name", ""), "input_ids", "inputs_embeds"]
    found = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    if found is None and kwargs.get("encoder_outputs") is not None:
        found = kwargs["encoder_outputs"][0]
    if not isinstance(found, Tensor) or found.ndim < 2:
        shown = "none" if found is None else f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
        raise BitDeltaError(
            f"generate needs inputs with one row per tenant and got {shown}: pass {base.main_input_name}= a tensor of "
            "two dimensions or more, rows first"
        )
    return found


def _groups(base: PreTrainedModel, profiles: Sequence[Profile], kwargs: Mapping[str, Any]) -> list[Group]:
    """The rows by their settings, which are resolved as transformers resolves them for a model of its own."""
    given = kwargs.get("generation_config")
    options = {name: value for name, value in kwargs.items() if name not in ("inputs", "generation_config")}
    resolver: Any = copy.copy(base)
    resolved: dict[int, GenerationConfig] = {}
    for profile in profiles:
        if id(profile.generation_config) in resolved:
            continue
        resolver.generation_config = profile.generation_config
        config = resolver._prepare_generation_config(given, **options)[0]
        mode = config.get_generation_mode()
        if mode in _OTHER_MODES:
            raise UnsupportedError(
                f"generate cannot do {mode.value.replace('_', ' ')} with tenants, which {_OTHER_MODES[mode]} in the "
                f"settings for {profile} asks for. Use greedy search, sampling or beams, {_WAY_OUT}"
            )
        if config.token_healing:
            raise UnsupportedError(
                f"generate cannot do token_healing with tenants, which the settings for {profile} ask for: it "
                f"generates for one row at a time inside the call. Pass token_healing=False, {_WAY_OUT}"
            )
        resolved[id(profile.generation_config)] = config
    configs = [resolved[id(profile.generation_config)] for profile in profiles]
    groups = grouped(profiles, configs, {**({} if given is None else vars(given)), **options})
    guidance = configs[0].guidance_scale
    if len(groups) > 1 and guidance is not None and guidance != 1:
        raise UnsupportedError(
            "generate cannot take guidance_scale for rows with different settings: guidance runs all rows once more "
            "inside one logits processor. Generate for tenants with different settings in separate calls"
        )
    return groups


def _generators(
    groups: Sequence[Group], inputs: Tensor, generators: Sequence[torch.Generator] | None
) -> list[torch.Generator | None]:
    """Per input row: its generator, if it samples."""
    total = inputs.shape[0]
    sampled = {row for group in groups if group.config.do_sample for row in group.rows}
    if not sampled:
        return [None] * total
    if generators is None:
        generators = seeded(total, inputs.device)
    different = len({id(each) for each in generators})
    if len(generators) != total or different != total:
        raise BitDeltaError(
            f"generators must be {total}, one per input row and none of them twice, and are {len(generators)}, "
            f"{different} of them different: a row's draws must not depend on another's"
        )
    for row, each in enumerate(generators):
        if each.device.type != inputs.device.type:
            raise BitDeltaError(
                f"the generator of row {row} is on {each.device} and the inputs are on {inputs.device}: make it with "
                f"torch.Generator({str(inputs.device)!r})"
            )
    own = [each if row in sampled else None for row, each in enumerate(generators)]
    if groups[0].config.num_beams == 1:
        return own
    # Beam search goes on for rows that have finished: the caller's generators must not tell how long.
    return [None if each is None else streams(each, 1)[0] for each in own]
