"""The Transformer++ an EBT for text is compared with, started as the EBT is."""

import torch
from torch import nn
from transformers import PreTrainedModel


EMBEDDING_STD = 1.0  # torch's own, which the official code leaves to the embeddings of both kinds of model


@torch.no_grad()
def initialize_as_ebt(twin: PreTrainedModel) -> None:
    """
    Draws the weights of a twin anew from the distributions an EBT starts from, as the official code does for its
    baseline: embeddings N(0, 1), matrices Xavier-normal. transformers would draw all of them from N(0, 0.02), from
    which a small model learns more slowly at first, and overfits a small text later (`docs/results/thinking.md`).

    Args:
        twin (`PreTrainedModel`): a new model, of [`transformer_pp_config`]; changed in place.

    Example:

    ```python
    >>> from transformers import LlamaForCausalLM
    >>> from ebt_transformers import transformer_pp_config
    >>> from ebt_transformers.training.llama_twin import initialize_as_ebt

    >>> twin = LlamaForCausalLM(transformer_pp_config("4xs", vocab_size=256))
    >>> initialize_as_ebt(twin)
    >>> round(float(twin.get_input_embeddings().weight.std()), 1)
    1.0
    ```
    """
    for module in twin.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)


__all__ = ["initialize_as_ebt"]
