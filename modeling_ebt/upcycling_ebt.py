"""From an ordinary language model to one that can think: a trained Llama becomes the start of every descent."""

from typing import Any

from transformers import LlamaForCausalLM

from .configuration_ebt import EBTConfig
from .modeling_ebt import EBTForCausalLM


# what both kinds of model call the same
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rope_parameters", "rms_norm_eps"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
OF_THE_RECIPE = "proposal"  # the one whose models start at a prediction


def ebt_from_llama(model: LlamaForCausalLM, **overrides: Any) -> EBTForCausalLM:
    """
    An [`EBTForCausalLM`] that predicts what `model` predicts, and can learn to think from there (not in the paper).

    Its context stream has the weights of `model` and its candidate table those of the output layer, so that at
    `thinking_steps=0` it is that model. Its energy head is zero: until it is trained, thinking changes nothing. Train
    it with recipe `"proposal"`.

    Args:
        model (`LlamaForCausalLM`): without biases. Its tensors are copied, not shared.
        overrides: fields of [`EBTConfig`] that say how to think, over those of recipe `"proposal"`. Not those of the
            architecture.

    Returns:
        [`EBTForCausalLM`] in the dtype and on the device of `model`, in evaluation mode.

    Raises:
        TypeError: for another kind of model.
        ValueError: for a model with biases, and overrides that would not fit its weights.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaForCausalLM
    >>> from ebt_transformers import ebt_from_llama, transformer_pp_config

    >>> llama = LlamaForCausalLM(transformer_pp_config("4xs", vocab_size=64)).eval()
    >>> model = ebt_from_llama(llama)
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> torch.allclose(model(ids, thinking_steps=0).logits, llama(ids).logits, atol=1e-4)
    True
    ```
    """
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(f"`ebt_from_llama` takes a LlamaForCausalLM, got {type(model).__name__}.")
    theirs = model.config
    for name in ("attention_bias", "mlp_bias"):
        if getattr(theirs, name, False):
            raise ValueError(f"The model has biases (`{name}=True`), and an EBT has none: it cannot take its weights.")
    fixed = sorted(set(overrides) & {*SHAPE, "candidate_embedding", "tie_word_embeddings", "candidate_init"})
    if fixed:
        raise ValueError(f"{', '.join(fixed)}: given by the model itself. Leave out what its weights decide.")
    shape = {name: getattr(theirs, name) for name in SHAPE}
    tied = "shared" if theirs.tie_word_embeddings else "linear"
    config = EBTConfig.for_recipe(OF_THE_RECIPE, **{**shape, "candidate_embedding": tied, **overrides})
    ebt = EBTForCausalLM(config)
    given = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    given["candidate_embedding.weight"] = model.lm_head.weight.detach()
    missing, unknown = ebt.load_state_dict(given, strict=False)
    wrong = [*(name for name in missing if name.startswith("model.layers")), *unknown]
    if wrong:
        raise ValueError(f"The weights are not those of a plain Llama: {', '.join(wrong)} has no counterpart.")
    ebt.generation_config = model.generation_config
    ebt.to(device=model.device, dtype=model.dtype)
    ebt.step_size.float()  # half precision is too coarse for it, see `_keep_in_fp32_modules_strict`
    return ebt.eval()


__all__ = ["OF_THE_RECIPE", "ebt_from_llama"]
