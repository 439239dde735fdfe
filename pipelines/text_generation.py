"""Generated text together with the thinking behind every token."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import ThinkingConfig


@dataclass(frozen=True)
class TokenThought:
    """
    One generated token and how it was found.

    Args:
        token (`int`): its id.
        text (`str`): what it decodes to on its own.
        energies (`list[float]`): energy of its prediction before every thinking step and after the last (K + 1).
            Values of steps on different landscapes are not comparable.
        steps_taken (`int`): thinking steps that moved the prediction.
    """

    token: int
    text: str
    energies: list[float]
    steps_taken: int


@dataclass(frozen=True)
class ThoughtfulGeneration:
    """
    One continuation of one prompt.

    Args:
        prompt (`str`): what it continues.
        text (`str`): the continuation alone, without special tokens.
        tokens (`list[TokenThought]`): every generated token, the end-of-sequence token included, padding not.
    """

    prompt: str
    text: str
    tokens: list[TokenThought]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, as `json.dumps` takes them."""
        return asdict(self)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"]) if prompt else []
    if ids:
        return ids
    if tokenizer.bos_token_id is None:
        raise ValueError("The prompt is empty and the tokenizer has no bos token to start from. Give some text.")
    return [tokenizer.bos_token_id]


def _left_padded(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (rows, longest), text at the right end."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(row)
        mask[number, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [value] if isinstance(value, int) else list(value)


def _number_generated(tokens: list[int], end_ids: list[int], pad_token_id: int | None) -> int:
    """How many tokens of a row are text: up to its first end-of-sequence token, and without the padding behind."""
    for position, token in enumerate(tokens):
        if token in end_ids:
            return position + 1
    length = len(tokens)
    while length and tokens[length - 1] == pad_token_id:
        length -= 1
    return length


def room_for(model: PreTrainedModel, prompt_length: int) -> int:
    """How many tokens a model can add to a prompt; the last one is never context itself."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return sys.maxsize if longest is None else longest - prompt_length + 1


def check_room(model: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> None:
    """
    Refuses, before any work is done, to generate past the longest context of a model.

    Args:
        model (`PreTrainedModel`): its `config.max_position_embeddings` counts.
        prompt_length, max_new_tokens (`int`): what is asked for.

    Raises:
        ValueError: if they do not fit, saying how many new tokens do.
    """
    room = room_for(model, prompt_length)
    if max_new_tokens <= room:
        return
    longest = model.config.max_position_embeddings
    advice = f"Ask for at most {room} new tokens" if room > 0 else "Shorten the prompt"
    raise ValueError(
        f"The prompt has {prompt_length} tokens and `max_new_tokens` is {max_new_tokens}, but the model's context "
        f"holds {longest} tokens. {advice}."
    )


def generate_with_energies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    thinking: ThinkingConfig | Mapping[str, Any] | None = None,
    **generate_kwargs: Any,
) -> list[ThoughtfulGeneration]:
    r"""
    Continues prompts, and reports the energies of every generated token.

    Prompts of different lengths form one batch; a row's result does not depend on the others.

    Args:
        model ([`EBTForCausalLM`]): the model.
        tokenizer: its tokenizer.
        prompts (`str` or sequence of `str`): the beginnings; an empty one starts from the bos token.
        thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think about every token.
        generate_kwargs: anything `model.generate` takes, `thinking_steps=8` and the like included.

    Returns:
        `list[ThoughtfulGeneration]`: one per prompt, or `num_return_sequences` per prompt, in order.

    Raises:
        TypeError: for a model without energies.
        ValueError: for no prompt at all, an empty prompt without bos token, a text longer than the model's context,
            and for thinking options that are unknown or out of range.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from ebt_transformers.assets import checkpoint_path
    >>> from ebt_transformers.pipelines import generate_with_energies

    >>> model = AutoModelForCausalLM.from_pretrained(checkpoint_path())
    >>> tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    >>> (result,) = generate_with_energies(model, tokenizer, "ROMEO:\n", thinking_steps=4, max_new_tokens=8)
    >>> len(result.tokens[0].energies)
    5
    ```
    """
    if not hasattr(model, "energy"):
        raise TypeError(f"{type(model).__name__} is no energy-based model: it has no energies to report.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("There is no prompt. Give at least one.")
    configured = generate_kwargs.get("generation_config") or model.generation_config

    def option(name: str) -> Any:
        value = generate_kwargs.get(name)
        return getattr(configured, name, None) if value is None else value

    end_ids = _as_ids(option("eos_token_id"))
    pad_token_id = option("pad_token_id")
    if pad_token_id is None:
        pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = end_ids[0] if end_ids else 0
    rows = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    if option("max_new_tokens") is not None:
        check_room(model, max(map(len, rows)), option("max_new_tokens"))
    input_ids, attention_mask = _left_padded(rows, pad_token_id, model.device)
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        **{
            "pad_token_id": pad_token_id,
            "thinking": thinking,
            **generate_kwargs,
            "output_energies": True,
            "return_dict_in_generate": True,
        },
    )
    new = output.sequences[:, input_ids.shape[1] :].tolist()
    energies, steps = output.energies.tolist(), output.steps_taken.tolist()
    per_prompt = len(new) // len(prompts)
    results = []
    for number, tokens in enumerate(new):
        kept = tokens[: _number_generated(tokens, end_ids, pad_token_id)]
        thoughts = [
            TokenThought(token, tokenizer.decode([token]), energies[number][position], steps[number][position])
            for position, token in enumerate(kept)
        ]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        results.append(ThoughtfulGeneration(prompts[number // per_prompt], text, thoughts))
    return results


__all__ = ["ThoughtfulGeneration", "TokenThought", "check_room", "generate_with_energies", "room_for"]
