"""
Perplexity of texts by number of thinking steps, as an `evaluate` module.

It imports the package instead of standing alone: a checkpoint without code of its own can only be loaded where the
package is, and the numbers are then those of the package's own `text_losses`, whatever becomes of either.
"""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


try:
    from ebt_transformers.pipelines.text_scores import TextLosses, load_text_model, text_losses
except ImportError as error:  # inside `try`, evaluate does not look for it and ask for a package of another name
    raise ImportError("The metric ebt_perplexity needs the package: `pip install ebt-transformers`.") from error


_DESCRIPTION = """
Perplexity of texts under a language model that thinks by descending an energy: exp of the mean loss of a token, after
any number of thinking steps. Lower is better. Any other causal language model has one perplexity, whatever the number
of steps. Texts may be of any length: those longer than the model's context are cut into windows, in which every token
is predicted once.
"""

_CITATION = """
@article{gladstone2025energybased,
  title = {Energy-Based Transformers are Scalable Learners and Thinkers},
  author = {Gladstone, Alexi and Nanduru, Ganesh and Islam, Md Mofijul and Han, Peixuan and Ha, Hyeonjeong and
            Chadha, Aman and Du, Yilun and Ji, Heng and Li, Jundong and Iqbal, Tariq},
  journal = {arXiv preprint arXiv:2507.02092},
  year = {2025},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): the texts; `data` is another name for it, by which `evaluate.evaluator` gives them.
    model (`str`, `Path` or `PreTrainedModel`): a folder, a Hub id, or the model itself.
    tokenizer (`str`, `Path` or tokenizer, *optional*): needed with a model given as itself.
    thinking_steps (`int` or `list` of `int`, *optional*): how long to think; a list gives a result for each, all from
        one descent. The model's own number by default. Models that do not think ignore it.
    batch_size (`int`, *optional*, defaults to 8): texts (or windows of them) at a time.
    add_start_token (`bool`, *optional*, defaults to `True`): predict the first token of a text too, from the bos token
        (the eos token, if there is none).
    max_length (`int`, *optional*, defaults to the model's context): tokens of context, at most.
    reduction (`str`, *optional*, defaults to `"mean"`): `"mean"`, over all tokens of all texts, or `"none"`, a list
        with the value of every text.
    device (`str` or `torch.device`, *optional*): move the model there; by default it stays where it is.
    trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with the checkpoint.
    thinking_...: further options of thinking, as in `ThinkingConfig`.

    All but the texts may also be given once for all, to `evaluate.load`; those of a call win.

Returns:
    perplexity (`float`; `list` of `float` with `reduction="none"`): exp of the mean loss. With a list of
        `thinking_steps` a `dict` with that for each of them.
    mean_loss: the mean loss of a token in nats, in the same form.
    tokens (`int`, or `list` of `int` with `reduction="none"`): how many tokens were predicted.

Raises:
    ValueError: for no texts, a text without a token to predict, no model, a model without tokenizer, and options that
        are unknown or out of range.

Example:

```python
>>> import evaluate
>>> from ebt_transformers.assets import checkpoint_path
>>> from ebt_transformers.metrics import metric_path

>>> perplexity = evaluate.load(metric_path("ebt_perplexity"), model=str(checkpoint_path()))
>>> texts = ["ROMEO:\\nWhat light through yonder window breaks?", "To be, or not to be"]
>>> result = perplexity.compute(predictions=texts, thinking_steps=[1, 4])
>>> sorted(result["perplexity"]), result["tokens"]
([1, 4], 26)
```
"""


def _values(losses: Sequence[float], tokens: Sequence[int], reduction: str) -> list[float]:
    """Mean losses of a token: of all texts together, or of each."""
    if reduction == "mean":
        return [sum(losses) / sum(tokens)]
    return [loss / count for loss, count in zip(losses, tokens, strict=True)]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # what a float cannot hold


def _result(found: TextLosses, reduction: str, by_steps: bool) -> dict[str, Any]:
    means = {count: _values(losses, found.tokens, reduction) for count, losses in found.losses.items()}
    alone = reduction == "mean"
    loss = {count: values[0] if alone else values for count, values in means.items()}
    perplexity = {
        count: _perplexity(values[0]) if alone else [_perplexity(value) for value in values]
        for count, values in means.items()
    }
    tokens = sum(found.tokens) if alone else found.tokens
    if by_steps:
        return {"perplexity": perplexity, "mean_loss": loss, "tokens": tokens}
    return {"perplexity": next(iter(perplexity.values())), "mean_loss": next(iter(loss.values())), "tokens": tokens}


class EBTPerplexity(evaluate.Metric):
    """Perplexity with thinking; how it is called stands in its `inputs_description`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in _OPTIONS or name.startswith("thinking_")}
        super().__init__(*args, **kwargs)
        self.options = own

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2507.02092"],
        )

    def compute(self, *, predictions: Any = None, data: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """The perplexity of texts, which may also be called `data`."""
        if predictions is not None and data is not None:
            raise ValueError("`data` is another name for `predictions`: give one of them.")
        return super().compute(predictions=data if predictions is None else predictions, **kwargs)

    def add_batch(self, *, predictions: Any = None, **kwargs: Any) -> None:
        """Adds texts."""
        if not isinstance(predictions, Sequence) or isinstance(predictions, str) or len(predictions) == 0:
            raise ValueError(f"`predictions` must be a list of at least one text, got {predictions!r}.")
        if wrong := [text for text in predictions if not isinstance(text, str)]:
            raise ValueError(f"`predictions` must be texts, got {wrong[0]!r}.")
        super().add_batch(predictions=list(predictions), **kwargs)

    def _compute(self, predictions: list[str], **kwargs: Any) -> dict[str, Any]:
        options = {**self.options, **kwargs}
        thinking = {name: options.pop(name) for name in list(options) if name.startswith("thinking_")}
        if unknown := sorted(options.keys() - _OPTIONS):
            raise ValueError(f"Unknown option(s) {', '.join(unknown)}. Allowed: {', '.join(sorted(_OPTIONS))}.")
        reduction = options.pop("reduction", "mean")
        if reduction not in ("mean", "none"):
            raise ValueError(f"`reduction` must be 'mean' or 'none', got {reduction!r}.")
        loading = {name: options.pop(name, default) for name, default in _LOADING.items()}
        model, tokenizer = load_text_model(**loading)
        steps = thinking.pop("thinking_steps", None)
        by_steps = isinstance(steps, (list, tuple))
        if steps is None and hasattr(model, "energy"):
            steps = model.config.default_thinking().steps
        found = text_losses(
            model, tokenizer, predictions, steps if by_steps else [steps], thinking=thinking, **options
        )
        return _result(found, reduction, by_steps)


_LOADING = {"model": None, "tokenizer": None, "device": None, "trust_remote_code": False}
_OPTIONS = {*_LOADING, "batch_size", "add_start_token", "max_length", "reduction"}
