"""`pipeline("energy-scoring")`: how well texts or continuations of a prompt fit, by energy and likelihood."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..configuration.thinking_ebt import FLAT_THINKING_NAMES, ThinkingConfig
from .carried_code import PipelineWithCode
from .text_scores import TokenScores, check_scorer, token_scores
from .text_windows import EncodedText, encode_continuations, encode_texts


ROWS = 8  # windows that go through the model at once, if no `batch_size` says otherwise
# what a text can be judged by: the name of its numbers in a record, and in `TokenScores`
SCORES = {
    "relative_energy": ("relative_energy", "relative_energies"),
    "energy": ("energy", "energies"),
    "likelihood": ("nll", "losses"),
}
REDUCTIONS = ("mean", "sum")
FORWARD_OPTIONS = ("landscape", "max_length", "_batch_size")
POSTPROCESS_OPTIONS = ("score_by", "reduction", "output_tokens")


class EnergyScoringPipeline(PipelineWithCode):
    r"""
    Scores texts, and ranks continuations of a prompt, with [`EBTForCausalLM`]: `pipeline("energy-scoring", model=...)`
    after `import ebt_transformers`.

    Every token gets three numbers, in all of which lower fits better:

    - `energy`: of the token itself, as a candidate that is this token alone. It is what the model gives, but **only
      differences within a position mean anything**: positions differ by more than tokens do, so that means over
      texts are a poor judge, and can put nonsense below good text;
    - `relative_energy`: that less the energy of what the model predicts in the same place, after thinking;
    - `nll`: minus the logarithm of the token's probability under that prediction, in nats.

    Texts may be longer than the model's context: they are cut into windows in which every token is scored once.

    Args:
        model ([`EBTForCausalLM`] or `str`): the model, or a folder or Hub id of one.
        tokenizer (*optional*): needed with a model given as itself.
        batch_size (`int`, *optional*): inputs (of a single one: windows, 8) that go through the model at once.
        kwargs: defaults of the options of a call, below.

    Options, at construction and of every call, which wins:

        score_by (`str`, *optional*, defaults to `"relative_energy"`): what `score` and `best` go by: `"energy"`,
            `"relative_energy"` or `"likelihood"`.
        reduction (`str`, *optional*, defaults to `"mean"`): what of a text's tokens is its score, and ranked: their
            `"mean"` or their `"sum"`.
        output_tokens (`bool`, *optional*, defaults to `True`): add what every token got.
        landscape (`int`, *optional*): which landscape gives the energies; the last by default.
        add_start_token (`bool`, *optional*, defaults to `True`): score the first token, too, from the bos token (the
            eos token, if there is none).
        max_length (`int`, *optional*, defaults to the model's context): tokens of context, at most.
        thinking ([`ThinkingConfig`] or `dict`, *optional*), thinking_steps, thinking_candidates, ...: how to think.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from ebt_transformers.assets import checkpoint_path

    >>> scorer = pipeline("energy-scoring", model=str(checkpoint_path()), device="cpu", thinking_steps=2)
    >>> result = scorer("To be, or not to be")
    >>> result["num_tokens"], [token["text"] for token in result["tokens"]][:3]
    (7, ['To', ' be', ','])
    >>> scorer({"prompt": "First Citizen:\nWe are", "continuations": [" zebra 42 %%", " all the people"]})["best"]
    ' all the people'
    ```
    """

    TASK = "energy-scoring"
    AUTO_MODEL = "AutoModelForCausalLM"
    INPUT_TYPE = "text"
    SAVED_BESIDE = ("tokenizer",)

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_scorer(self.model)
        if self.tokenizer is None:
            raise ValueError("There is no `tokenizer`: a model given as itself needs it beside.")
        self.model.eval()

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """
        Scores texts.

        Args:
            inputs: a text; a `dict` with a `prompt` and its `continuations`, a list of texts; a list of those (texts
                and prompts in any mixture), or a dataset or a generator of them, where a `dict` with a `text` is a
                text, too.
            batch_size (`int`, *optional*): inputs that go through the model at once.
            options: those of the class.

        Returns:
            A `dict` for a single input, a `list` of them for a list, an iterator of them for a dataset or a generator,
            in order. Of a text:

            - `text` (`str`), `score` (`float`; lower fits better) and `num_tokens` (`int`), those that were scored;
            - `mean_energy` and `total_energy`, `mean_relative_energy` and `total_relative_energy`, `mean_nll` and
              `total_nll` (`float`);
            - `tokens` (`list`, with `output_tokens`): of each `token` (its id), `text`, `energy`, `relative_energy`
              and `nll`.

            Of a prompt:

            - `prompt` (`str`) and `continuations`, a list with all that for each, in the order given;
            - `ranking`: by `"relative_energy"`, `"energy"` and `"likelihood"` each the numbers of the continuations,
              counted from 0, best first;
            - `best` (`str`): the first by `score_by`.

        Raises:
            ValueError: for unknown options and values out of range, and texts or continuations without a token.
            TypeError: for inputs of another kind.
        """
        if isinstance(inputs, list) and not inputs:
            raise ValueError("There is no text: the list is empty. Give at least one.")
        rows = batch_size if batch_size is not None else self._batch_size
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {rows!r}.")
        return super().__call__(inputs, batch_size=batch_size, _batch_size=rows or ROWS, **options)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward: dict[str, Any] = {"thinking": self._take_thinking(options)}
        forward |= {name: options.pop(name) for name in FORWARD_OPTIONS if name in options}
        preprocess = {name: options.pop(name) for name in ("add_start_token",) if name in options}
        postprocess = {name: options.pop(name) for name in POSTPROCESS_OPTIONS if name in options}
        for name, allowed in (("score_by", tuple(SCORES)), ("reduction", REDUCTIONS)):
            if name in postprocess and postprocess[name] not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {postprocess[name]!r}.")
        if options:
            own = [*FORWARD_OPTIONS[:-1], *POSTPROCESS_OPTIONS, "add_start_token", "thinking"]
            raise ValueError(
                f"Unknown option(s) {', '.join(sorted(options))}. "
                f"Allowed: {', '.join(sorted([*own, *FLAT_THINKING_NAMES]))}."
            )
        return preprocess, forward, postprocess

    def preprocess(self, inputs: Any, add_start_token: bool = True) -> dict[str, Any]:
        """A text, or a prompt with its continuations, as tokens."""
        texts, prompt = _taken_apart(inputs)
        if prompt is None:
            encoded = encode_texts(self.tokenizer, texts, add_start_token)
        else:
            encoded = encode_continuations(self.tokenizer, prompt, texts, add_start_token)
        return {"prepared": {"prompt": prompt, "texts": texts, "encoded": encoded}}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        thinking: ThinkingConfig | None = None,
        landscape: int | None = None,
        max_length: int | None = None,
        _batch_size: int = ROWS,
    ) -> dict[str, Any]:
        prepared = model_inputs["prepared"]
        batched = isinstance(prepared, list)
        entries = prepared if batched else [prepared]
        encoded: list[EncodedText] = [one for entry in entries for one in entry["encoded"]]
        found = iter(token_scores(self.model, encoded, _batch_size, max_length, landscape, thinking))
        results = [
            {"prompt": entry["prompt"], "texts": entry["texts"], "scores": [next(found) for _ in entry["encoded"]]}
            for entry in entries
        ]
        return {"results": results if batched else results[0]}

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        score_by: str = "relative_energy",
        reduction: str = "mean",
        output_tokens: bool = True,
    ) -> dict[str, Any]:
        """The record of one input."""
        found = model_outputs["results"]
        records = []
        for text, scores in zip(found["texts"], found["scores"], strict=True):
            record = _record(text, scores, score_by, reduction)
            if output_tokens:
                record["tokens"] = self._tokens(scores)
            records.append(record)
        if found["prompt"] is None:
            return records[0]
        ranking = {name: _ranking(records, name, reduction) for name in SCORES}
        best = records[ranking[score_by][0]]["text"]
        return {"prompt": found["prompt"], "best": best, "ranking": ranking, "continuations": records}

    def _tokens(self, scores: TokenScores) -> list[dict[str, Any]]:
        columns = {name: getattr(scores, values).tolist() for name, values in SCORES.values()}
        return [
            {"token": token, "text": self.tokenizer.decode([token]), **{name: columns[name][at] for name in columns}}
            for at, token in enumerate(scores.ids)
        ]


def _taken_apart(inputs: Any) -> tuple[list[str], str | None]:
    """Texts and the prompt they continue, if they do."""
    if isinstance(inputs, Mapping) and "text" in inputs:
        inputs = inputs["text"]
    if isinstance(inputs, str):
        return [inputs], None
    if not isinstance(inputs, Mapping) or not {"prompt", "continuations"} <= inputs.keys():
        raise TypeError(
            'An input must be a text, or {"prompt": a text, "continuations": [texts]}, got '
            f"{sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__}."
        )
    prompt, continuations = inputs["prompt"], inputs["continuations"]
    if isinstance(continuations, str) or not isinstance(continuations, Sequence):
        raise TypeError(f"`continuations` must be a list of texts, got {type(continuations).__name__}.")
    for text in (prompt, *continuations):
        if not isinstance(text, str):
            raise TypeError(f"`prompt` and `continuations` must be texts, got {text!r}.")
    return list(continuations), prompt


def _reduced(name: str, reduction: str) -> str:
    """The name in a record of what a text has by one of the scores."""
    return f"{'mean' if reduction == 'mean' else 'total'}_{SCORES[name][0]}"


def _record(text: str, scores: TokenScores, score_by: str, reduction: str) -> dict[str, Any]:
    record: dict[str, Any] = {"text": text, "score": 0.0, "num_tokens": len(scores.ids)}
    for name, (_, attribute) in SCORES.items():
        values = getattr(scores, attribute).astype(np.float64)
        record |= {_reduced(name, "mean"): float(values.mean()), _reduced(name, "sum"): float(values.sum())}
    return {**record, "score": record[_reduced(score_by, reduction)]}


def _ranking(records: Sequence[Mapping[str, Any]], name: str, reduction: str) -> list[int]:
    """Numbers of the records, the one with the lowest score first."""
    return sorted(range(len(records)), key=lambda number: records[number][_reduced(name, reduction)])


__all__ = ["EnergyScoringPipeline"]
