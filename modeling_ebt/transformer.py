"""
The two-stream transformer: context tokens in, candidates in, energies out.

Shapes: ``B`` rows, ``S`` new context tokens, ``N`` candidates a row, ``V`` vocabulary, ``D`` width, ``K`` landscapes.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .checks import check_attention_mask, check_length, check_position_ids, check_token_ids
from .configuration_ebt import EBTConfig
from .layers import EBTDecoderLayer, EBTRMSNorm
from .layers_common import EBTEnergyHead, EBTModulation, EBTStepSize, head_energies, modulate, modulation_parts
from .masks import (
    additive,
    longest_text,
    packed_texts,
    positions_from_mask,
    visible_columns,
    with_own_column,
    with_step_column,
    with_step_row,
)
from .outputs import EBTContext, EBTModelOutputWithPast
from .pretrained import EBTBasePreTrainedModel


class EBTPreTrainedModel(EBTBasePreTrainedModel):
    """Loading, saving and initialisation shared by the text models."""

    config: EBTConfig
    config_class = EBTConfig
    base_model_prefix = "model"
    _no_split_modules = ["EBTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "context"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        zero = self.config.step_conditioning == "adaln_zero"
        if zero and isinstance(module, (EBTModulation, EBTEnergyHead)):
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif self.config.starts_at_prediction and isinstance(module, EBTEnergyHead):
            init.zeros_(module.weight)  # thinking begins as leaving the proposal alone
        elif isinstance(module, EBTModulation):
            # adaln keeps torch's own initialisation of a linear layer, as the official code does
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, nn.Linear):
            init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, EBTStepSize):
            init.constant_(module.value, float(self.config.step_size))


class EBTModel(EBTPreTrainedModel):
    r"""
    The transformer: context tokens in, candidates in, energies out.

    Without candidates it encodes the context (an ordinary causal transformer). With `candidate_embeds` it also gives
    the energy of a candidate at every position.

    Args:
        config ([`EBTConfig`]): the architecture.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EBTConfig, EBTModel

    >>> model = EBTModel(EBTConfig.from_preset("4xs", vocab_size=32)).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> model(ids).last_hidden_state.shape
    torch.Size([1, 3, 128])
    >>> model(ids, candidate_embeds=torch.zeros(1, 3, 128)).energies.shape
    torch.Size([1, 3])
    ```
    """

    _auto_class = "AutoModel"  # a saved model carries its code

    def __init__(self, config: EBTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        conditioned = config.step_conditioning != "none"
        self.step_embeddings = nn.Embedding(config.num_landscapes, config.hidden_size) if conditioned else None
        self.layers = nn.ModuleList([EBTDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = EBTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.final_modulation = EBTModulation(config.hidden_size, 2) if config.is_modulated else None
        self.energy_head = EBTEnergyHead(config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def has_step_token(self) -> bool:
        """Whether a learned token in front of the context tells the landscape."""
        return self.config.step_conditioning == "time_embed"

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        candidate_embeds: Tensor | None = None,
        landscape: int = 0,
        num_landscapes: int | None = None,
        context: EBTContext | None = None,
        need_hidden: bool = True,
        **kwargs: Any,
    ) -> EBTModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): new context tokens.
            attention_mask (`Tensor` of shape `(B, past + S)`, *optional*): 1 for tokens, 0 for padding, left or right.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): counted from `attention_mask` by default.
            past_key_values (`Cache`, *optional*): context of earlier calls.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, D)`, *optional*): instead of `input_ids`.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`): return `past_key_values`.
            output_hidden_states, output_attentions (`bool`, *optional*): of the context stream.
            candidate_embeds (`torch.FloatTensor` of shape `(B, N, D)`, *optional*): embedded candidates to score.
            landscape (`int`, *optional*, defaults to 0): the energy landscape candidates are scored on.
            num_landscapes (`int`, *optional*): encode the context for the first so many landscapes (all by default).
            context ([`EBTContext`], *optional*): of an earlier call, instead of tokens.
            need_hidden (`bool`, *optional*, defaults to `True`): compute `last_hidden_state`; candidates only need
                keys.

        Returns:
            [`EBTModelOutputWithPast`].

        Raises:
            ValueError: for empty input, both or neither of `input_ids` and `inputs_embeds`, token ids outside the
                vocabulary, a row without any token, or a context longer than `config.max_position_embeddings`.
        """
        output = EBTModelOutputWithPast(context=context)
        if context is None:
            output = self._encode_context(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=bool(use_cache),
                output_hidden_states=self._requested(output_hidden_states, "output_hidden_states"),
                output_attentions=self._requested(output_attentions, "output_attentions"),
                num_landscapes=num_landscapes or self.config.num_landscapes,
                need_hidden=need_hidden,
            )
        if candidate_embeds is not None and output.context is not None:
            output.energies = self._score_candidates(candidate_embeds, output.context, landscape)
        return output

    def _step_vectors(self, first: int, end: int) -> Tensor:
        """Embeddings (K, D) of the landscapes `first` to `end - 1`; only for models with step conditioning."""
        assert self.step_embeddings is not None
        # through the module, not its weight: an adapter around it has a say, too
        return self.step_embeddings(torch.arange(first, end, device=self.step_embeddings.weight.device))

    def _requested(self, value: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name, False) if value is None else value)

    def _encode_context(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool,
        output_hidden_states: bool,
        output_attentions: bool,
        num_landscapes: int,
        need_hidden: bool,
    ) -> EBTModelOutputWithPast:
        """The context stream: every landscape is one more row of the batch, so weights are read once."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if input_ids is not None:
            check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None  # one of the two was given
        batch, length, _ = inputs_embeds.shape
        device = inputs_embeds.device
        # as in transformers: positions without a mask may say that a row holds several texts
        texts = None
        check_position_ids(position_ids, batch, length)
        if position_ids is not None and attention_mask is None and past_key_values is None:
            texts = packed_texts(position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        columns = past + length if past_key_values is None else past_key_values.get_mask_sizes(length, 0)[0]
        longest = length if texts is None else longest_text(texts)
        check_length(batch, longest, past, self.config.max_position_embeddings)
        check_attention_mask(attention_mask, batch, length, past, columns)
        if past > 0:
            num_landscapes = self._cached_landscapes(past_key_values, num_landscapes)

        if position_ids is None:
            position_ids = positions_from_mask(attention_mask, length, past, device)
        visible = visible_columns(attention_mask, length, columns, past, device, texts)
        steps = 1 if self.has_step_token else 0
        hidden = inputs_embeds[:, None].expand(batch, num_landscapes, length, -1)
        rotary_positions = position_ids + steps
        if steps:
            tokens = self._step_vectors(0, num_landscapes).to(hidden.dtype)
            tokens = tokens[None, :, None].expand(batch, -1, -1, -1)
            hidden = torch.cat([tokens, hidden], dim=2)
            rotary_positions = torch.nn.functional.pad(rotary_positions, (1, 0), value=0)
            candidate_mask = with_step_column(visible)
        else:
            candidate_mask = visible
        hidden = hidden.reshape(batch * num_landscapes, steps + length, -1)
        rotary = self._rotary(hidden, rotary_positions, num_landscapes)
        packed = texts is not None
        mask = self._attention_mask(attention_mask, visible, past, columns, num_landscapes, hidden.dtype, packed)
        condition = None
        if self.final_modulation is not None:
            condition = self._step_vectors(0, num_landscapes).repeat(batch, 1)

        keys: list[Tensor] = []
        values: list[Tensor] = []
        all_hidden: list[Tensor] = []
        all_weights: list[Tensor] = []
        need_hidden = need_hidden or output_hidden_states or output_attentions

        def reported(tensor: Tensor, tokens: int) -> Tensor:
            """Of the last landscape, without the step token along dimension `tokens`."""
            if num_landscapes > 1:
                tensor = tensor.view(batch, num_landscapes, *tensor.shape[1:])[:, -1]
            return tensor.narrow(tokens, steps, length) if steps else tensor

        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden.append(reported(hidden, 1))
            extend = None
            if past_key_values is not None:
                extend = self._cache_extension(past_key_values, index, batch, num_landscapes)
            keys_only = not need_hidden and index == len(self.layers) - 1
            call: Callable = layer
            if self.gradient_checkpointing and self.training:
                call = functools.partial(self._gradient_checkpointing_func, layer.__call__)
            hidden, key, value, weights = call(hidden, rotary, mask, condition, None, extend, keys_only)
            keys.append(key.view(batch, num_landscapes, *key.shape[1:]))
            values.append(value.view(batch, num_landscapes, *value.shape[1:]))
            if output_attentions and weights is not None:
                all_weights.append(reported(weights, 2))

        last = predictors = None
        if need_hidden:
            last = self.norm(reported(hidden, 1))
            if self.config.starts_at_prediction:
                # of the first landscape, so that the start does not depend on how many steps follow
                first = hidden.unflatten(0, (batch, num_landscapes))[:, 0, steps:]
                predictors = last if num_landscapes == 1 else self.norm(first)
            if output_hidden_states:
                all_hidden.append(last)
        return EBTModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            context=EBTContext(
                keys,
                values,
                candidate_mask,
                position_ids + 1 + steps,
                anchors=inputs_embeds if self.config.candidate_anchor == "token" else None,
                predictors=predictors,
            ),
        )

    def _cached_landscapes(self, cache: Cache, wanted: int) -> int:
        cached = cache.layers[0].keys.shape[1] // self.config.key_value_heads
        if cached < wanted:
            raise ValueError(
                f"The cache holds the context of {cached} landscape(s), but this call needs {wanted}. Use the number "
                "of thinking steps the cache was made with, or start with an empty cache."
            )
        return cached

    def _cache_extension(self, cache: Cache, layer: int, batch: int, landscapes: int) -> Callable:
        """Appends to the cache, landscapes side by side as heads; the step token is put in front, not cached."""
        steps = 1 if self.has_step_token else 0

        def tokens(tensor: Tensor) -> Tensor:
            return tensor[:, :, steps:].unflatten(0, (batch, landscapes)).flatten(1, 2)

        def extend(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            stored = cache.update(tokens(key), tokens(value), layer)
            stored = tuple(part.unflatten(1, (landscapes, -1)).flatten(0, 1) for part in stored)
            if not steps:
                return stored
            return torch.cat([key[:, :, :1], stored[0]], dim=2), torch.cat([value[:, :, :1], stored[1]], dim=2)

        return extend

    def _rotary(self, hidden: Tensor, position_ids: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary_emb(hidden, position_ids=position_ids)
        if repeats > 1 and cos.shape[0] > 1:
            cos, sin = cos.repeat_interleave(repeats, dim=0), sin.repeat_interleave(repeats, dim=0)
        return cos, sin

    def _attention_mask(
        self,
        given: Tensor | None,
        visible: Tensor,
        past: int,
        columns: int,
        landscapes: int,
        dtype: torch.dtype,
        packed: bool,
    ) -> Tensor | None:
        """The context stream's mask, or None where plain causality says it all and the backend has it built in."""
        eager = self.config._attn_implementation == "eager"
        plain = not eager and not packed and past == 0 and columns == visible.shape[-2]
        # the look at the mask itself comes last: on an accelerator it has to be waited for
        if plain and (given is None or (given.dim() == 2 and bool(given.all()))):
            return None
        visible = with_own_column(visible, past)
        if self.has_step_token:
            visible = with_step_row(with_step_column(visible))
        if visible.shape[0] > 1:
            visible = visible.repeat_interleave(landscapes, dim=0)
        return additive(visible, dtype) if eager else visible

    def _score_candidates(self, candidate_embeds: Tensor, context: EBTContext, landscape: int) -> Tensor:
        """Energies (B, N) of embedded candidates (B, N, D), in float32."""
        if not 0 <= landscape < context.num_landscapes:
            raise ValueError(
                f"`landscape` must be between 0 and {context.num_landscapes - 1} for this context, got {landscape}."
            )
        hidden = candidate_embeds if context.anchors is None else candidate_embeds + context.anchors
        rotary = self._rotary(hidden, context.position_ids, 1)
        condition = None
        if self.final_modulation is not None:
            condition = self._step_vectors(landscape, landscape + 1)
        unseen = ~context.mask
        for layer, keys_and_values in zip(self.layers, context.on_landscape(landscape), strict=True):
            hidden = layer(hidden, rotary, unseen, condition, keys_and_values)[0]
        hidden = self.norm(hidden)
        if self.final_modulation is not None and condition is not None:
            hidden = modulate(hidden, *modulation_parts(self.final_modulation, condition))
        return head_energies(self.energy_head, hidden)


__all__ = ["EBTModel", "EBTPreTrainedModel"]
