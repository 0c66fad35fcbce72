"""A base model as one `generate` call sees it: transformers' loops and weights of its own, model calls of its tenants.

A view is a shallow copy of the base that shares its weights and config. Its class is a subclass of the base's, with
`forward` redirected and those methods overridden in which transformers' loops look at a generation config. All state of
the call lives on the view, so threads with different tenants never mix.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .profiles import Group, merged
from .rowwise import RowwiseCriteria, RowwiseProcessor, for_rows
from .sampling import Draw, DrawingCriteria, continuations, derived

Forward = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]

_Loops: Any = object  # transformers' GenerationMixin, once the view's class is made


@dataclass
class Call:
    """State of one `generate` call: its rows by settings, and per input row the generator if the row samples."""

    base: PreTrainedModel
    forward: Forward
    groups: list[Group]
    generators: Sequence[torch.Generator | None]
    draw: Draw | None = field(default=None, init=False)

    @property
    def rows(self) -> int:
        return len(self.generators)

    @property
    def samples(self) -> bool:
        return any(each is not None for each in self.generators)

    def per_row(self, value: Callable[[Any], int], times: int, device: Any) -> Tensor:
        """A value of each row's settings, repeated for the entries in its place: int64 [rows * times]."""
        values = torch.empty(self.rows, dtype=torch.long)
        for group in self.groups:
            values[group.rows] = value(group.config)
        return values.repeat_interleave(times).to(device)


def view_of(call: Call) -> Any:
    """The view of the call's base: `view.generate` is transformers' own."""
    view: Any = copy.copy(call.base)
    view.__dict__.pop("forward", None)
    kind: Any = type(call.base)
    view.__class__ = _view_class(kind)
    view.tenant_call = call
    return view


@functools.cache
def _view_class(base: Any) -> type:
    """The class of a base's views. It has the name and module of the base's class: transformers looks at both."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    return type(base.__name__, (_TenantView, base), {"forward": forward, "__module__": base.__module__})


class _TenantView(_Loops):  # type: ignore[misc]
    tenant_call: Call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Past nn.Module's: hooks run where the base runs.
        return self.tenant_call.forward(self.tenant_call.base, args, kwargs)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        encoder = super().get_encoder(*args, **kwargs)
        return encoder if encoder is self else _Encoder(encoder, self.tenant_call.forward)

    def _supports_mm_encoder_outputs(self) -> bool:
        # Images are encoded inside forward: transformers would call the base's own encoder first.
        return False

    def _prepare_special_tokens(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        super()._prepare_special_tokens(generation_config, *args, **kwargs)
        call, device = self.tenant_call, kwargs.get("device")
        for group in call.groups:
            super()._prepare_special_tokens(group.config, device=device)
        if len(call.groups) > 1:
            # Beam search keeps as many candidates as the longest list of end tokens asks for.
            longest = max(call.groups, key=lambda group: _ends(group.config)).config
            generation_config._eos_token_tensor = longest._eos_token_tensor
            if generation_config._decoder_start_token_tensor is not None:
                starts = call.per_row(lambda config: int(config._decoder_start_token_tensor), 1, device)
                generation_config._decoder_start_token_tensor = starts

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Any:
        call = self.tenant_call
        masks = torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        for group in call.groups:
            own = for_rows(group.rows, call.rows, {"inputs": inputs_tensor, **model_kwargs})
            found = super()._prepare_attention_mask_for_generation(own.pop("inputs"), group.config, own)
            masks[group.rows] = found
        return masks

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        call = self.tenant_call
        times = max(generation_config.num_beams, generation_config.num_return_sequences)
        if len(call.groups) == 1:
            processors = super()._get_logits_processor(generation_config, **kwargs)
        else:
            processors = self._rowwise_processors(generation_config, times, **kwargs)
        if call.samples and generation_config.num_beams == 1:
            call.draw = Draw([each for own in call.generators for each in derived(own, times)])
            processors.append(call.draw)
        return processors

    def _rowwise_processors(
        self,
        generation_config: GenerationConfig,
        times: int,
        *,
        logits_processor: LogitsProcessorList | None = None,
        encoder_input_ids: Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        """Each group's processors on its rows. The caller's own see all rows, and stand where transformers has them:
        behind those of the settings, before those of sampling.
        """
        call, custom = self.tenant_call, list(logits_processor or [])
        replaced = {type(each) for each in custom}
        before, after = [], []
        for group in call.groups:
            config = merged(generation_config, group)
            mark = _Mark()
            processors = super()._get_logits_processor(
                config,
                logits_processor=LogitsProcessorList([mark]),
                encoder_input_ids=for_rows(group.rows, call.rows, {"ids": encoder_input_ids})["ids"],
                model_kwargs=for_rows(group.rows, call.rows, model_kwargs or {}, times),
                prefix_allowed_tokens_fn=_for_group(prefix_allowed_tokens_fn, group, config),
                **kwargs,
            )
            place = processors.index(mark)
            before.append([each for each in processors[:place] if type(each) not in replaced])
            after.append(processors[place + 1 :])
        rows = [group.rows for group in call.groups]
        return LogitsProcessorList(
            [RowwiseProcessor(rows, before, call.rows), *custom, RowwiseProcessor(rows, after, call.rows)]
        )

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList | None, **kwargs: Any
    ) -> Any:
        call, custom = self.tenant_call, StoppingCriteriaList(stopping_criteria or [])
        if len(call.groups) == 1:
            criteria = super()._get_stopping_criteria(generation_config, stopping_criteria=custom, **kwargs)
        else:
            loop = copy.copy(generation_config)
            loop.stop_strings = loop._eos_token_tensor = None
            criteria = super()._get_stopping_criteria(loop, stopping_criteria=custom, **kwargs)
            replaced = {type(each) for each in custom}
            parts = []
            for group in call.groups:
                config = merged(generation_config, group)
                own = super()._get_stopping_criteria(config, stopping_criteria=StoppingCriteriaList(), **kwargs)
                parts.append([each for each in own if type(each) not in replaced])
            criteria.append(RowwiseCriteria([group.rows for group in call.groups], parts, call.rows))
        return criteria if call.draw is None else DrawingCriteria(criteria, call.draw)

    def _sample(self, input_ids: Tensor, *, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        call = self.tenant_call
        # `Draw` has chosen: the loop's argmax finds it.
        generation_config.do_sample = False
        fill = generation_config._pad_token_tensor
        if len(call.groups) > 1:
            times = input_ids.shape[0] // call.rows
            pads = call.per_row(lambda config: _pad(config, fill), times, input_ids.device)
            generation_config._pad_token_tensor = pads
        return super()._sample(input_ids, generation_config=generation_config, **kwargs)

    def _beam_search(self, input_ids: Tensor, *, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        call, as_dict = self.tenant_call, generation_config.return_dict_in_generate
        generation_config.return_dict_in_generate = True
        result = super()._beam_search(input_ids, generation_config=generation_config, **kwargs)
        if len(call.groups) > 1:
            entries, longest = result.sequences.shape
            pads = call.per_row(_beam_pad, entries // call.rows, input_ids.device)
            lengths = input_ids.shape[1] + (result.beam_indices >= 0).sum(dim=1)
            over = torch.arange(longest, device=input_ids.device) >= lengths[:, None]
            result.sequences = torch.where(over, pads[:, None], result.sequences)
        return result if as_dict else result.sequences

    def _get_top_k_continuations(self, accumulated_log_probs: Tensor, **kwargs: Any) -> Any:
        call, keep = self.tenant_call, kwargs["beams_to_keep"]
        if not call.samples and len(call.groups) == 1:
            return super()._get_top_k_continuations(accumulated_log_probs=accumulated_log_probs, **kwargs)
        chosen = continuations(accumulated_log_probs, keep, call.generators)
        # Ranked by order of choice, the chosen are what the search for the highest finds.
        order = torch.arange(keep, 0, -1, device=chosen.device, dtype=accumulated_log_probs.dtype)
        ranks = torch.full_like(accumulated_log_probs, -torch.inf).scatter_(1, chosen, order.expand_as(chosen))
        kwargs["do_sample"] = False
        _, sequences, beams = super()._get_top_k_continuations(accumulated_log_probs=ranks, **kwargs)
        # A row with fewer end tokens than another keeps fewer candidates when it is alone.
        own = call.per_row(lambda config: max(2, 1 + _ends(config)) * kwargs["num_beams"], 1, chosen.device)
        spare = torch.arange(keep, device=chosen.device) >= own[:, None]
        return accumulated_log_probs.gather(1, chosen).masked_fill(spare, -torch.inf), sequences, beams


class _Encoder:
    """An encoder as `generate` uses it: its attributes are the module's, a call runs through the tenants' graph."""

    def __init__(self, module: nn.Module, run: Forward) -> None:
        self._module = module

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(module, args, kwargs)

        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Mark:
    """Stands where transformers puts a caller's logits processors."""


def _for_group(
    function: Callable[[int, Tensor], list[int]] | None, group: Group, config: GenerationConfig
) -> Callable[[int, Tensor], list[int]] | None:
    """The caller's function of an entry of the batch, as a function of an entry of the group's."""
    if function is None:
        return None
    times = config.num_return_sequences if config.num_beams == 1 else 1
    return lambda entry, ids: function(group.rows[entry // times] * times + entry % times, ids)


def _ends(config: Any) -> int:
    return 0 if config._eos_token_tensor is None else len(config._eos_token_tensor)


def _pad(config: Any, fill: Tensor | None) -> int:
    """The group's pad token. A row that has none ends only by the caller's own criteria; others' fill it."""
    pad = fill if config._pad_token_tensor is None else config._pad_token_tensor
    return 0 if pad is None else int(pad)


def _beam_pad(config: Any) -> int:
    """What transformers fills up beams with: the pad token or, where that is 0 or unset, the first end token."""
    return _pad(config, None) or (int(config._eos_token_tensor[0]) if _ends(config) else -1)
