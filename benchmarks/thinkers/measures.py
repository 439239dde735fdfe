"""What benchmarks/thinking.py measures: losses by thinking steps, difficulty of tokens, cost. Not a script."""

import argparse
import hashlib
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Results, alternate, timed
from thinkers.data import INSIDE
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, TrainingArguments

from ebt_transformers import ThinkingConfig, transformer_pp_config
from ebt_transformers.pipelines.perplexity import losses_by_steps
from ebt_transformers.training.card_measurements import count_flops


GROUPS = 5  # of tokens by difficulty
TIMED_ROWS = 8


def thinks(model: PreTrainedModel) -> bool:
    """Whether a model has an energy to descend."""
    return hasattr(model, "energy")


def starts_with_prediction(config: PreTrainedConfig) -> bool:
    """Whether a descent starts at a prediction of the context stream, so that no step at all is a prediction too."""
    return getattr(config, "starts_at_prediction", False)  # a twin has no such thing


def fewest_steps(config: PreTrainedConfig) -> int:
    """The fewest steps whose prediction was trained; 0 for a model that does not think."""
    if starts_with_prediction(config) or not hasattr(config, "default_thinking"):
        return 0
    return config.random_steps[0] if config.random_steps else config.default_thinking().steps


def file_fingerprint(path: Path) -> str:
    """
    Tells files apart by what is in them.

    Args:
        path (`Path`): of the file.

    Raises:
        FileNotFoundError: if it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}: give the folder of a saved model.")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


# ---- losses ----------------------------------------------------------------------------------------------------


def batch_losses(model: PreTrainedModel, ids: Tensor, steps: Sequence[int], **thinking: Any) -> dict[int, Tensor]:
    """
    The loss of every token of one batch after each number of thinking steps.

    Args:
        model (`PreTrainedModel`): an EBT in evaluation mode, or an ordinary model, for which `steps` is `[0]`.
        ids (`torch.LongTensor` of shape `(B, S)`): tokens.
        steps (sequence of `int`): numbers of steps. With one candidate they all come from the longest descent.
        thinking: other options of thinking, under their flat names.

    Returns:
        By number of steps, `(B, S - 1)` in nats.
    """
    if not thinks(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return {0: F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")}
    given = {"input_ids": ids, "labels": ids, "use_cache": False, "loss_reduction": "none"}
    losses = losses_by_steps(model, given, steps, ThinkingConfig.from_value(thinking))
    # nothing is known of the token after the last
    return {count: of_tokens[:, :-1] for count, of_tokens in zip(steps, losses, strict=True)}


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, rows: Tensor, steps: Sequence[int], batch_size: int, label: str, **thinking: Any
) -> dict[int, Tensor]:
    """
    [`batch_losses`] of all rows, one after the other.

    Args:
        model, steps, thinking: as there.
        rows (`torch.LongTensor` of shape `(rows, S)`): tokens.
        batch_size (`int`): rows at a time.
        label (`str`): of the progress bar.

    Returns:
        By number of steps, `(rows x (S - 1),)` in nats.
    """
    parts: dict[int, list[Tensor]] = {count: [] for count in steps}
    for batch in tqdm(rows.split(batch_size), desc=label, leave=False):
        for count, losses in batch_losses(model, batch.to(model.device), steps, **thinking).items():
            parts[count].append(losses.flatten().cpu())
    return {count: torch.cat(losses) for count, losses in parts.items()}


def group_means(losses: Tensor, difficulty: Tensor, groups: int = GROUPS) -> list[float]:
    """
    Mean losses of equally large groups of tokens, the easiest first.

    Args:
        losses (`Tensor` of shape `(tokens,)`): to average.
        difficulty (`Tensor` of shape `(tokens,)`): by which tokens are put in order.
        groups (`int`, *optional*, defaults to 5): how many.
    """
    order = difficulty.argsort(stable=True)
    return [losses[part].double().mean().item() for part in order.tensor_split(groups)]


# ---- cost ------------------------------------------------------------------------------------------------------


def passes(config: PreTrainedConfig, steps: int, candidates: int) -> dict[str, int]:
    """
    Passes of the transformer for one prediction.

    Args:
        config (`PreTrainedConfig`): of an EBT.
        steps, candidates (`int`): of thinking.

    Returns:
        `contexts`: readings of the context, one for each landscape. `forwards`, `backwards`: of candidates; several
        of them need a last forward pass each, which tells the best.
    """
    contexts = min(max(steps, 1), config.num_landscapes)
    last = candidates if candidates > 1 else 0
    return {"contexts": contexts, "forwards": steps * candidates + last, "backwards": steps * candidates}


def _update(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor, options: dict[str, Any]
) -> Callable[[], None]:
    def update() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False, **options).loss.backward()
        optimizer.step()

    return update


def updates_of_training(
    model: PreTrainedModel, arguments: TrainingArguments | None, batch: int, length: int
) -> list[Callable[[], None]]:
    """
    Functions that do an update each, one for every number of steps that training draws; their mean is its cost.

    Args:
        model (`PreTrainedModel`): in training mode; its weights change.
        arguments (`TrainingArguments`, *optional*): those it was trained with: a replay buffer adds rows to a batch.
        batch, length (`int`): rows and tokens of a batch.
    """
    if getattr(arguments, "replay_buffer_size", None):
        batch += int(batch * arguments.replay_buffer_share)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    drawn = getattr(model.config, "random_steps", None)
    counts = range(drawn[0], drawn[1] + 1) if drawn else [None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    options = [{} if count is None else {"thinking_steps": count} for count in counts]
    return [_update(model, optimizer, ids.to(model.device), chosen) for chosen in options]


def compare_updates(
    model: PreTrainedModel, arguments: TrainingArguments, batch: int, length: int, repeats: int
) -> dict[str, float]:
    """
    What an update of a model costs in units of one of its twin.

    Args:
        model (`PreTrainedModel`): an EBT, or the twin itself. It is of no use afterwards.
        arguments, batch, length: as in [`updates_of_training`].
        repeats (`int`): turns of the timing.

    Returns:
        `flops_ratio` (matrix products), `seconds_ratio` (the median of the turns, in each of which both work), and the
        `seconds` and `twin_seconds` of one update.
    """
    if not thinks(model):
        return {"flops_ratio": 1.0, "seconds_ratio": 1.0}
    twin = LlamaForCausalLM(transformer_pp_config(model.config)).to(model.device).train()
    own, others = (
        updates_of_training(model.train(), arguments, batch, length),
        updates_of_training(twin, None, batch, length),
    )
    flops = [statistics.fmean(count_flops(update) for update in updates) for updates in (own, others)]
    device = str(model.device)
    seconds, of_twin, ratio = alternate(
        lambda: [statistics.fmean(timed(update, device) for update in own)],
        lambda: [timed(others[0], device)],
        repeats,
    )
    model.eval()
    return {
        "flops_ratio": flops[0] / flops[1],
        "seconds_ratio": ratio,
        "seconds": seconds,
        "twin_seconds": of_twin,
    }


@torch.no_grad()
def prediction_cost(
    model: PreTrainedModel, rows: Tensor, steps: int, candidates: int, repeats: int
) -> dict[str, float]:
    """
    What thinking about all tokens of some rows costs, in units of the twin's forward pass on them.

    Args:
        model (`PreTrainedModel`): an EBT in evaluation mode.
        rows (`torch.LongTensor` of shape `(rows, S)`): tokens.
        steps, candidates (`int`): of thinking.
        repeats (`int`): turns of the timing.

    Returns:
        [`passes`], `flops_ratio` and `seconds_ratio`.
    """
    twin = LlamaForCausalLM(transformer_pp_config(model.config)).to(model.device).eval()
    ids, device = rows[:TIMED_ROWS].to(model.device), str(model.device)
    options = {"thinking_steps": steps, "thinking_candidates": candidates, "thinking_noise_std": 0.0}
    works = [partial(model, use_cache=False, **options), partial(twin, use_cache=False)]
    flops = [count_flops(partial(work, input_ids=ids[:1])) for work in works]
    *_, ratio = alternate(
        lambda: [timed(partial(works[0], input_ids=ids), device)],
        lambda: [timed(partial(works[1], input_ids=ids), device)],
        repeats,
    )
    return {**passes(model.config, steps, candidates), "flops_ratio": flops[0] / flops[1], "seconds_ratio": ratio}


# ---- all of it -------------------------------------------------------------------------------------------------


class Evaluation:
    """
    Measures models and collects the rows; what the results hold already is not measured again.

    Args:
        results ([`Results`]): gets the rows.
        tests (`dict[str, Tensor]`): blocks `(rows, S)` by the name of the set.
        options (`argparse.Namespace`): of the command line.
        vocabulary (`int`): tokens of the tokenizer.
    """

    def __init__(
        self, results: Results, tests: dict[str, Tensor], options: argparse.Namespace, vocabulary: int
    ) -> None:
        self.results = results
        self.tests = tests
        self.options = options
        self.vocabulary = vocabulary
        self.fingerprints: dict[tuple[str, int], str] = {}  # of the models seen, by name and seed
        self._judges: dict[int, tuple[str, Tensor]] = {}  # of a seed: its first twin, and the losses of the tokens

    def __call__(self, model: PreTrainedModel, key: dict[str, Any]) -> None:
        """
        Measures one model.

        Args:
            model (`PreTrainedModel`): in evaluation mode.
            key (`dict`): its `name`, `seed` and fingerprint (`model`).
        """
        own = {name: key[name] for name in ("name", "seed", "model")}
        self.fingerprints[own["name"], own["seed"]] = own["model"]
        plain = self._losses_of_sets(model, own)
        if not thinks(model):
            if own["seed"] not in self._judges:
                self._judges[own["seed"]] = own["model"], self._inside(model, own, plain)[0]
            return
        self._difficulty(model, own, plain)
        first = next(seed for name, seed in self.fingerprints if name == own["name"])
        if own["seed"] == first:  # what a step costs does not depend on the weights
            self._costs(model, own)

    def _steps(self, model: PreTrainedModel, candidates: int = 1) -> list[int]:
        if not thinks(model):
            return [0]
        if candidates > 1:
            return self.options.candidate_steps
        return [count for count in self.options.steps if count or starts_with_prediction(model.config)]

    def _complete(self, row: dict[str, Any] | None, model: PreTrainedModel, candidates: int = 1) -> bool:
        """Whether a row has the losses of all steps asked for."""
        return row is not None and row["losses"].keys() >= {str(count) for count in self._steps(model, candidates)}

    def _ways(self, model: PreTrainedModel) -> list[tuple[int, float]]:
        """Candidates and noise to evaluate with."""
        if not thinks(model):
            return [(1, 0.0)]
        of_training = float(model.config.thinking_noise_std)
        noises = sorted({0.0, of_training if self.options.noise == "train" else 0.0})
        return [(count, noise) for noise in noises for count in sorted({1, self.options.candidates})]

    def _measure(
        self, model: PreTrainedModel, own: dict[str, Any], name: str, candidates: int, noise: float
    ) -> dict[int, Tensor]:
        # said on every call: models trained with noise would otherwise think with it
        thinking = {"thinking_candidates": candidates, "thinking_noise_std": noise} if thinks(model) else {}
        label = f"{own['name']}, seed {own['seed']}, {name}, {candidates} cand., noise {noise:g}"
        steps = self._steps(model, candidates)
        return token_losses(model, self.tests[name], steps, self.options.batch_size, label, **thinking)

    def _losses_of_sets(self, model: PreTrainedModel, own: dict[str, Any]) -> dict[str, dict[int, Tensor]]:
        """Rows of mean losses; returns those of the tokens of sets in distribution, where they were measured."""
        plain: dict[str, dict[int, Tensor]] = {}
        for name in self.tests:
            for candidates, noise in self._ways(model):
                key = {"kind": "losses", **own, "set": name, "candidates": candidates, "noise": noise}
                row = self.results.find(**key)
                if self._complete(row, model, candidates):
                    continue
                losses = self._measure(model, own, name, candidates, noise)
                means = {str(count): values.double().mean().item() for count, values in losses.items()}
                self.results.append({**key, "tokens": len(next(iter(losses.values()))), "losses": means})
                if name in INSIDE and (candidates, noise) == (1, 0.0):
                    plain[name] = losses
        return plain

    def _inside(
        self, model: PreTrainedModel, own: dict[str, Any], plain: dict[str, dict[int, Tensor]]
    ) -> dict[int, Tensor]:
        """Losses of all tokens of the sets in distribution, one candidate without noise, by number of steps."""
        sets = [plain.get(name) or self._measure(model, own, name, 1, 0.0) for name in INSIDE]
        return {count: torch.cat([losses[count] for losses in sets]) for count in self._steps(model)}

    def _difficulty(self, model: PreTrainedModel, own: dict[str, Any], plain: dict[str, dict[int, Tensor]]) -> None:
        if own["seed"] not in self._judges:
            return  # no twin of this seed says what is difficult
        twin, difficulty = self._judges[own["seed"]]
        key = {"kind": "difficulty", **own, "twin": twin}
        row = self.results.find(**key)
        if self._complete(row, model):
            return
        losses = self._inside(model, own, plain)
        means = {str(count): group_means(values, difficulty) for count, values in losses.items()}
        self.results.append({**key, "twin_losses": group_means(difficulty, difficulty), "losses": means})

    def _costs(self, model: PreTrainedModel, own: dict[str, Any]) -> None:
        rows = next(iter(self.tests.values()))
        wanted = [(steps, 1) for steps in self._steps(model)]
        if self.options.candidates > 1:
            wanted += [(steps, self.options.candidates) for steps in self.options.candidate_steps]
        keys = [{"kind": "cost", **own, "steps": steps, "candidates": count} for steps, count in wanted]
        missing = [key for key in keys if self.results.find(**key) is None]
        for key in tqdm(missing, desc=f"{own['name']}: costs", leave=False):
            cost = prediction_cost(model, rows, key["steps"], key["candidates"], self.options.repeats)
            self.results.append({**key, **cost})


__all__ = [
    "GROUPS",
    "Evaluation",
    "batch_losses",
    "compare_updates",
    "fewest_steps",
    "file_fingerprint",
    "group_means",
    "passes",
    "prediction_cost",
    "starts_with_prediction",
    "thinks",
    "token_losses",
    "updates_of_training",
]
