"""
The Energy Transformer itself (arXiv 2302.07253): tokens in, and where they come to by descending the energy out.

Shapes: ``B`` samples, ``N`` tokens, ``D`` width, ``H`` heads, ``E`` edges, ``S`` blocks, ``T`` steps of each.
"""

import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .checks import check_energies
from .configuration_energy_transformer import EnergyTransformerConfig
from .descent import StopRules, descend
from .edges import check_edge_index
from .energies import (
    DensePattern,
    EdgePattern,
    EnergyAttention,
    EnergyLayerNorm,
    EnergyTransformerBlock,
    HopfieldMemory,
    Pattern,
    precise,
)
from .outputs_et import EnergyTransformerModelOutput
from .positions import sincos_positions
from .pretrained import EBTBasePreTrainedModel
from .thinking_ebt import FLAT_PREFIX, ThinkingConfig
from .thinking_et import BlockEnergy, TokenSpace, resolve_thinking


ET_TAGS = ("energy-transformer", "energy-based-model")  # what the Hub lists our models under
# what lives in another folder of the package; a saved model carries the files of these
SHARED = (descend, StopRules, EBTBasePreTrainedModel, ThinkingConfig, check_energies, sincos_positions)


class EnergyTransformerPreTrainedModel(EBTBasePreTrainedModel):
    """Loading, saving and initialisation shared by the Energy Transformers."""

    config: EnergyTransformerConfig
    config_class = EnergyTransformerConfig
    base_model_prefix = "model"
    main_input_name = "inputs_embeds"
    _supports_sdpa = False
    # what sharded training gathers as one: not whole blocks, whose norm is called by itself as well
    _no_split_modules = ["EnergyAttention", "EnergyLayerNorm", "HopfieldMemory"]

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)
        self.model_tags = list(ET_TAGS)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        spread = self.config.initializer_range
        attention_spread = self.config.attention_initializer_range
        if isinstance(module, EnergyAttention):
            init.normal_(module.key, mean=0.0, std=attention_spread)
            init.normal_(module.query, mean=0.0, std=attention_spread)
        elif isinstance(module, HopfieldMemory):
            init.normal_(module.patterns, mean=0.0, std=spread)
        elif isinstance(module, EnergyLayerNorm):
            init.ones_(module.gain)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=spread)
            if module.bias is not None:
                init.zeros_(module.bias)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        [`PreTrainedModel.save_pretrained`], with the code of the model.

        Args:
            save_directory (`str` or `PathLike`): a folder, made if need be.
            kwargs: of the parent.
        """
        super().save_pretrained(save_directory, **kwargs)
        _carry_shared_code(Path(save_directory))

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        _carry_shared_code(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _carry_shared_code(folder: Path) -> None:
    """Puts the files that `SHARED` comes from beside the model's own, in place of re-exports."""
    if not (folder / "transformer_et.py").is_file():
        return
    for shared in SHARED:
        source = Path(inspect.getfile(shared))
        # the rules are imported by the descent alone, so no re-export stands for them
        if not (folder / source.name).is_file() and shared is not StopRules:
            continue
        if source.resolve() != (folder / source.name).resolve():
            shutil.copyfile(source, folder / source.name)


class EnergyTransformerModel(EnergyTransformerPreTrainedModel):
    r"""
    The stack of blocks without a head. Tokens are either samples of equal length, all of whose pairs may attend, or
    those of graphs, which attend along edges.

    Args:
        config ([`EnergyTransformerConfig`]): the architecture.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EnergyTransformerConfig, EnergyTransformerModel

    >>> model = EnergyTransformerModel(EnergyTransformerConfig(hidden_size=32, num_attention_heads=4)).eval()
    >>> output = model(torch.randn(2, 10, 32), thinking_steps=3, output_energies=True)
    >>> output.last_hidden_state.shape, output.energies.shape
    (torch.Size([2, 10, 32]), torch.Size([2, 1, 4]))
    ```
    """

    _auto_class = "AutoModel"  # a saved model carries its code

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList([EnergyTransformerBlock(config) for _ in range(config.num_blocks)])
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def stack(self) -> list[EnergyTransformerBlock]:
        """The blocks in the order in which they are descended."""
        return cast(list[EnergyTransformerBlock], list(self.blocks))

    @property
    def norm(self) -> EnergyLayerNorm:
        """The layer norm of the last block, which readouts share."""
        return self.stack[-1].norm

    @can_return_tuple
    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        attention_weights: Tensor | None = None,
        edge_index: Tensor | None = None,
        edge_weights: Tensor | None = None,
        edge_type: Tensor | None = None,
        graph_index: Tensor | None = None,
        num_graphs: int | None = None,
        thinking: ThinkingConfig | dict[str, Any] | None = None,
        output_energies: bool | None = None,
        output_trajectory: bool | None = None,
        **kwargs: Any,
    ) -> EnergyTransformerModelOutput:
        """
        Args:
            inputs_embeds (`torch.FloatTensor` of shape `(B, N, D)`, of graphs `(N, D)`): the tokens to start from.
            attention_mask (`torch.Tensor` of shape `(B, N)`, `(B, N, N)` or `(B, H, N, N)`, *optional*): 1 (True) for
                tokens that are no padding, or for each query the keys that it may attend to. Exact: what is masked
                has no part in the energy.
            attention_weights (`torch.FloatTensor` broadcastable to `(B, H, N, N)`, *optional*): factors on the logits.
            edge_index (`torch.LongTensor` of shape `(2, E)`, *optional*): for graphs, which token (first row) is
                attended to by which (second row).
            edge_weights (`torch.FloatTensor` of shape `(E, H)`, *optional*): factors on the logits of edges.
            edge_type (`torch.LongTensor` of shape `(E,)`, *optional*): relation of each edge; needed by models with
                more than one.
            graph_index (`torch.LongTensor` of shape `(N,)`, *optional*): the graph of each token, for the energies; by
                default all are one.
            num_graphs (`int`, *optional*): how many; by default as many as `graph_index` names.
            thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think; its fields can also be given flat, as
                `thinking_steps=3`. `steps`, `step_size`, `step_size_scale`, `noise_std`, `seed`,
                `accept_only_lower_energy`, `tolerance` and `target_energy` mean something here, in each block.
            output_energies (`bool`, *optional*): return `energies`.
            output_trajectory (`bool`, *optional*): return `trajectory`.

        Returns:
            [`EnergyTransformerModelOutput`].

        Raises:
            ValueError: for tokens, masks and edges of the wrong shape or range, thinking options that are unknown, out
                of range or without a meaning here, rules that would stop several graphs together, and energies that
                are not finite.
        """
        flat = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(FLAT_PREFIX)}
        if kwargs:
            raise TypeError(f"Unknown argument(s) {', '.join(sorted(kwargs))}.")
        options = resolve_thinking(self.config, thinking, flat, self.training)
        self._check_tokens(inputs_embeds, edge_index)
        patterns: Sequence[Pattern]
        if edge_index is None:
            of_edges = {"edge_weights": edge_weights, "edge_type": edge_type}
            _refuse({**of_edges, "graph_index": graph_index, "num_graphs": num_graphs}, "`edge_index`")
            patterns = [self._dense_pattern(inputs_embeds, attention_mask, attention_weights)]
            state = inputs_embeds[:, None]
            graphs, count = None, 1
        else:
            _refuse({"attention_mask": attention_mask, "attention_weights": attention_weights}, "no `edge_index`")
            patterns = self._edge_patterns(len(inputs_embeds), edge_index, edge_weights, edge_type)
            state = inputs_embeds[None, None]
            graphs = torch.zeros_like(inputs_embeds[:, 0], dtype=torch.long) if graph_index is None else graph_index
            count = _count_graphs(graphs, len(inputs_embeds), num_graphs)
            if count > 1 and options.judges:
                raise ValueError(
                    f"{count} graphs descend together, and a rule that looks at the energy would stop them together. "
                    "Give them one by one, or leave out tolerance, target energy and acceptance."
                )
        generator = options.generator(state.device)
        recompute = self.training and torch.is_grad_enabled() and self.gradient_checkpointing
        checkpoint = self._gradient_checkpointing_func if recompute else None
        state = precise(state)
        states, energies, taken = [state], [], []

        def watch(index: int, after: Tensor, energy: Tensor) -> None:
            states.append(after.detach())

        for block in self.stack:
            result = descend(
                BlockEnergy(block, patterns, graphs, count),
                TokenSpace(block.norm, options.noise_std, generator),
                state,
                options.schedule,
                detach_between_steps=False,
                graph_on_steps="all" if torch.is_grad_enabled() else "none",
                accept_only_lower_energy=options.accept_only_lower_energy,
                stop=options.stop,
                final_energy=bool(output_energies),
                checkpoint=checkpoint,
                on_step=watch if output_trajectory else None,
            )
            state = result.state
            if not self.training:
                check_energies(result.energies[-1], options.step_sizes[-1])
            energies.append(torch.stack(result.energies, dim=-1).flatten(0, 1))
            taken.append(result.steps_taken.flatten())
        axis = 1 if graphs is None else 0
        tokens = state[:, 0] if graphs is None else state[0, 0]
        walked = [each[:, 0] if graphs is None else each[0, 0] for each in states]
        return EnergyTransformerModelOutput(
            last_hidden_state=tokens,
            energies=torch.stack(energies, dim=1) if output_energies else None,
            steps_taken=torch.stack(taken, dim=1),
            trajectory=torch.stack(walked, dim=axis) if output_trajectory else None,
        )

    def _check_tokens(self, tokens: Tensor, edge_index: Tensor | None) -> None:
        axes = "(samples, tokens, width)" if edge_index is None else "(tokens, width), with `edge_index`"
        if tokens.dim() != (3 if edge_index is None else 2) or tokens.numel() == 0:
            raise ValueError(f"`inputs_embeds` must be a non-empty tensor {axes}, got shape {tuple(tokens.shape)}.")
        if tokens.shape[-1] != self.config.hidden_size:
            raise ValueError(f"Tokens must have width {self.config.hidden_size}, got {tokens.shape[-1]}.")

    def _dense_pattern(self, tokens: Tensor, mask: Tensor | None, weights: Tensor | None) -> DensePattern:
        if self.config.num_relations > 1:
            raise ValueError(
                f"The model has {self.config.num_relations} relations, which belong to edges: give `edge_index` and "
                "`edge_type`."
            )
        rows, count = tokens.shape[:2]
        shapes = ((rows, count), (rows, count, count), (rows, self.config.num_attention_heads, count, count))
        allowed, real = None, None
        if mask is not None:
            if tuple(mask.shape) not in shapes:
                raise ValueError(
                    f"`attention_mask` must have one of the shapes {', '.join(map(str, shapes))}, got "
                    f"{tuple(mask.shape)}."
                )
            allowed = mask.bool()
            if mask.dim() == 2:
                real = allowed
                allowed = real[:, None, :, None] & real[:, None, None, :]
            elif mask.dim() == 3:
                allowed = allowed[:, None]
        if not self.config.self_attention:
            others = ~torch.eye(count, dtype=torch.bool, device=tokens.device)
            allowed = others[None, None] if allowed is None else allowed & others
        if weights is not None and not _broadcasts(weights.shape, shapes[-1]):
            raise ValueError(f"`attention_weights` must broadcast to {shapes[-1]}, got {tuple(weights.shape)}.")
        return DensePattern(allowed, weights, real)

    def _edge_patterns(
        self, count: int, edge_index: Tensor, weights: Tensor | None, kinds: Tensor | None
    ) -> list[EdgePattern]:
        relations = self.config.num_relations
        check_edge_index(edge_index, count)
        if weights is not None and tuple(weights.shape) != (edge_index.shape[1], self.config.num_attention_heads):
            raise ValueError(
                f"`edge_weights` must have shape ({edge_index.shape[1]}, {self.config.num_attention_heads}): edges, "
                f"heads; got {tuple(weights.shape)}."
            )
        if (kinds is None) != (relations == 1):
            raise ValueError(
                f"`edge_type` {'is missing' if kinds is None else 'was given'}, but the model has {relations} "
                "relation(s)."
            )
        if kinds is not None and tuple(kinds.shape) != (edge_index.shape[1],):
            raise ValueError(
                f"`edge_type` must have shape ({edge_index.shape[1]},), one relation for each edge, got "
                f"{tuple(kinds.shape)}."
            )
        if kinds is not None and kinds.numel() and not 0 <= int(kinds.min()) <= int(kinds.max()) < relations:
            raise ValueError(
                f"`edge_type` must hold relations from 0 to {relations - 1}, got {int(kinds.min())} to "
                f"{int(kinds.max())}."
            )
        kept = torch.ones_like(edge_index[0], dtype=torch.bool)
        if not self.config.self_attention:
            kept = edge_index[0] != edge_index[1]
        patterns = []
        for relation in range(relations):
            chosen = (kept if kinds is None else kept & (kinds == relation)).nonzero()[:, 0]
            keys, queries = edge_index[:, chosen]
            factors = None if weights is None else weights[chosen]
            patterns.append(EdgePattern.of(keys, queries, count, self.config.num_attention_heads, factors))
        return patterns


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be multiplied by one of another, which stays as it is."""
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    return len(padded) == len(target) and all(own in (1, wanted) for own, wanted in zip(padded, target, strict=True))


def _count_graphs(graphs: Tensor, tokens: int, given: int | None) -> int:
    """How many graphs the tokens belong to; raises for numbers of the wrong shape or range."""
    if tuple(graphs.shape) != (tokens,):
        raise ValueError(
            f"`graph_index` must have shape ({tokens},), one graph for each token, got {tuple(graphs.shape)}."
        )
    lowest, highest = (int(value) for value in torch.aminmax(graphs))
    if lowest < 0 or (given is not None and highest >= given):
        allowed = "from 0" if given is None else f"from 0 to {given - 1}"
        raise ValueError(f"`graph_index` must number graphs {allowed}, got {lowest} to {highest}.")
    return highest + 1 if given is None else given


def _refuse(given: Mapping[str, Tensor | int | None], needs: str) -> None:
    """Raises for inputs that would be ignored."""
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if names:
        raise ValueError(f"{', '.join(names)} needs {needs}.")


__all__ = ["EnergyTransformerModel", "EnergyTransformerPreTrainedModel"]
