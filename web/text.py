"""
How a language model found its tokens, as data: everything the tab "Text" of the web demonstration shows.

Shapes: ``M`` candidates, ``K`` thinking steps, ``V`` vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from ..configuration import ThinkingConfig
from ..modeling_ebt.generation import configured_thinking
from ..modeling_ebt.thinking import random_offsets, resolve_thinking
from ..pipelines.perplexity import fewest_steps
from ..pipelines.text_generation import TokenThought, check_room


@dataclass(frozen=True)
class WatchedToken(TokenThought):
    """A [`TokenThought`] and the entropy, in nats, of the distribution that thinking ended with."""

    entropy: float


@dataclass(frozen=True)
class WatchedText:
    """
    One continuation of one prompt, and all that is needed to look at the thinking behind any of its tokens again.

    Args:
        prompt_ids (`list[int]`): tokens of the prompt.
        text (`str`): the continuation alone, without special tokens.
        tokens (`list[WatchedToken]`): every generated token.
        thinking ([`ThinkingConfig`]): how each was thought about.
        landscapes (`list[int]`): the landscape of every step; energies of different ones cannot be compared.
    """

    prompt_ids: list[int]
    text: str
    tokens: list[WatchedToken]
    thinking: ThinkingConfig
    landscapes: list[int]

    @property
    def first_on_last_landscape(self) -> int:
        """Which energy of a token is the first that can be compared with its last one."""
        return self.landscapes.index(self.landscapes[-1]) if self.landscapes else 0


@dataclass(frozen=True)
class TokenWalk:
    """
    The descent that found one token.

    Args:
        energies (`Tensor` of shape `(M, K + 1)`): of every candidate, before every step and after the last.
        chosen (`int`): the candidate that was kept.
        distributions (`Tensor` of shape `(K + 1, V)`): what the chosen candidate stood for, at the start and after
            every step.
        starts_at_prediction (`bool`, *optional*, defaults to `False`): whether the start, too, says what is likely.
    """

    energies: Tensor
    chosen: int
    distributions: Tensor
    starts_at_prediction: bool = False


def entropy(distributions: Tensor) -> Tensor:
    """Entropy in nats of distributions `(..., V)`."""
    return torch.special.entr(distributions).sum(-1)


def encode_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new: int) -> list[int]:
    """
    Tokens of a prompt, checked.

    Args:
        model, tokenizer: who is to continue it.
        prompt (`str`): the beginning.
        new (`int`): how many tokens are to be added.

    Raises:
        ValueError: for an empty prompt, and one that leaves too little room in the model's context.
    """
    if not prompt:
        raise ValueError("The prompt is empty. Type some text for the model to continue.")
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])  # what is too long is said below, with what to do
    check_room(model, len(ids), new)
    return ids


@torch.no_grad()
def watch_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    thinking: ThinkingConfig,
    max_new_tokens: int = 40,
    temperature: float | None = None,
    seed: int = 0,
    **generate_options: Any,
) -> WatchedText:
    r"""
    Continues a prompt and keeps what was thought about every token.

    Args:
        model ([`EBTForCausalLM`]): the model, in evaluation mode.
        tokenizer: its tokenizer.
        prompt (`str`): the beginning.
        thinking ([`ThinkingConfig`]): how to think; what it leaves open is as in `generate()`.
        max_new_tokens (`int`, *optional*, defaults to 40): tokens to add at most.
        temperature (`float`, *optional*): of sampling from the whole vocabulary; by default the likeliest token is
            taken.
        seed (`int`, *optional*, defaults to 0): of sampling.
        generate_options: more for `model.generate`, a `streamer` for example.

    Raises:
        ValueError: as [`encode_prompt`], and for thinking options out of range.

    Example:

    ```python
    >>> from ebt_transformers import ThinkingConfig
    >>> from ebt_transformers.demo import load_checkpoint
    >>> from ebt_transformers.web.text import watch_text, watch_token

    >>> model, tokenizer = load_checkpoint()
    >>> text = watch_text(model, tokenizer, "ROMEO:\n", ThinkingConfig(steps=4, candidates=2), max_new_tokens=3)
    >>> walk = watch_token(model, text, 0)
    >>> len(text.tokens), walk.energies.shape, walk.distributions.shape
    (3, torch.Size([2, 5]), torch.Size([5, 1024]))
    ```
    """
    prompt_ids = encode_prompt(model, tokenizer, prompt, max_new_tokens)
    thinking = thinking.merged_over(configured_thinking(model.generation_config))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        torch.manual_seed(seed)
    ids = torch.tensor([prompt_ids], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=tokenizer.pad_token_id or 0,
        thinking=thinking,
        max_new_tokens=max_new_tokens,
        output_logits=True,
        output_energies=True,
        return_dict_in_generate=True,
        **sampling,
        **generate_options,
    )
    new = output.sequences[0, len(prompt_ids) :].tolist()
    entropies = entropy(torch.cat(output.logits).float().softmax(-1)).tolist()
    columns = (output.energies[0].tolist(), output.steps_taken[0].tolist(), entropies)
    tokens = [
        WatchedToken(token, tokenizer.decode([token]), energies, steps, spread)
        for token, energies, steps, spread in zip(new, *columns, strict=True)
    ]
    landscapes = resolve_thinking(model.config, thinking, {}, training=False).landscapes
    return WatchedText(prompt_ids, tokenizer.decode(new, skip_special_tokens=True), tokens, thinking, landscapes)


@torch.no_grad()
def watch_token(model: PreTrainedModel, text: WatchedText, index: int) -> TokenWalk:
    """
    Walks the descent of one token of a text again, and keeps every candidate and every step.

    The candidates are rows of a batch here, each with the start it had: the same walks, none of them left out.

    Args:
        model ([`EBTForCausalLM`]): the model that wrote the text.
        text ([`WatchedText`]): the text.
        index (`int`): which of its tokens, from 0.

    Raises:
        IndexError: if the text has no such token.
    """
    if not 0 <= index < len(text.tokens):
        raise IndexError(f"`index` must be between 0 and {len(text.tokens) - 1}, got {index}.")
    resolved = resolve_thinking(model.config, text.thinking, {}, training=False)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    count = resolved.candidates
    starts = random_offsets(resolved, (count, vocabulary), float(model.config.candidate_init_std), model.device)
    context = torch.tensor([text.prompt_ids + [token.token for token in text.tokens[:index]]], device=model.device)
    starts_at_prediction = fewest_steps(model) == 0
    if starts_at_prediction:  # the candidates lie around that
        alone = ThinkingConfig(steps=0, candidates=1, init="mean")
        starts = starts + model(context, thinking=alone, logits_to_keep=1, use_cache=False).logits[0]
    output = model(
        context.expand(count, -1),
        thinking=replace(text.thinking, candidates=1),
        initial_candidate=starts[:, None],
        logits_to_keep=1,
        use_cache=False,
        output_energies=True,
        output_trajectory=True,
    )
    energies = output.energies[:, -1].cpu()
    # candidates often end at the same place: which of them was kept is known by the energies it had on its way there
    known = torch.tensor(text.tokens[index].energies)
    chosen = int((energies - known).abs().sum(-1).argmin())
    distributions = output.trajectory[chosen, -1].softmax(-1).cpu()
    return TokenWalk(energies, chosen, distributions, starts_at_prediction)


def top_tokens(distributions: Tensor, count: int, always: int, first: int = 1) -> list[int]:
    """
    The tokens worth showing of a walk: those that were likeliest after any step, the likeliest of the end first.

    Args:
        distributions (`Tensor` of shape `(K + 1, V)`): at the start and after every step.
        count (`int`): how many.
        always (`int`): a token to show in any case.
        first (`int`, *optional*, defaults to 1): the step from which on being likely counts; 0 counts the start.
    """
    best = distributions[first:].max(0).values.topk(min(count, distributions.shape[1])).indices.tolist()
    if always not in best:
        best[-1] = always
    return sorted(best, key=lambda token: -float(distributions[-1, token]))


class _Channel(BaseStreamer):
    """Hands tokens to another thread as they are generated."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.prompt_is_next = True

    def put(self, value: Tensor) -> None:
        if not self.prompt_is_next:
            self.queue.put(int(value))
        self.prompt_is_next = False

    def end(self) -> None:
        """Nothing: the result that follows ends the stream."""


class _StopsOn(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    thinking: ThinkingConfig,
    stop: Event | None = None,
    **options: Any,
) -> Iterator[str | WatchedText]:
    """
    [`watch_text`] while it happens: yields the continuation so far (`str`) after every token, and at last the
    [`WatchedText`]. Generation ends when the iterator is closed.

    Args:
        model, tokenizer, prompt, thinking, options: as in [`watch_text`], and raises as it does.
        stop (`threading.Event`, *optional*): once it is set, the text ends with the token under way.
    """
    channel, stop = _Channel(), stop or Event()

    def work() -> None:
        criteria = StoppingCriteriaList([_StopsOn(stop)])
        try:
            options_here = {**options, "streamer": channel, "stopping_criteria": criteria}
            channel.queue.put(watch_text(model, tokenizer, prompt, thinking, **options_here))
        except Exception as error:  # to be raised where somebody sees it
            channel.queue.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    ids: list[int] = []
    try:
        while True:
            item = channel.queue.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, WatchedText):
                yield item
                return
            ids.append(item)
            yield tokenizer.decode(ids, skip_special_tokens=True)
    finally:
        stop.set()
        thread.join()  # two texts at once would share torch's random state


__all__ = [
    "TokenWalk",
    "WatchedText",
    "WatchedToken",
    "encode_prompt",
    "entropy",
    "stream_text",
    "top_tokens",
    "watch_text",
    "watch_token",
]
