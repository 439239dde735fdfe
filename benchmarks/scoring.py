"""Which energy tells what a model knows? Scores of texts against what is out of distribution, and of continuations.

    python benchmarks/scoring.py --twin runs/tiny_twin --data data

In distribution are pieces of the test part of Tiny Shakespeare. Out of it: the same with its words or its characters
shuffled, Python's standard library, and with --data WikiText (text/wikitext2_valid_test) and GSM8K (qa/gsm8k).
Everything drawn at random is drawn once per seed. Rows are written to a file as they are measured; the same command
continues where it was interrupted.
"""

import argparse
import json
import random
import statistics
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from common import Results, add_common_options, command_line, machine_settings, report
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ebt_transformers import EBTForCausalLM
from ebt_transformers.assets import checkpoint_path, shakespeare_splits
from ebt_transformers.metrics import metric_path
from ebt_transformers.reporting import of_steps, table


NAME = "scoring"
CHARACTERS = 8  # of text for every token of a piece, at most
WIKITEXT, GSM8K = "text/wikitext2_valid_test/test.txt", "qa/gsm8k/test.jsonl"
TWIN = "twin: nats"
# what the columns of a table are called: kinds of wrong continuations
ELSEWHERE, REORDERED = "from elsewhere", "own tokens, reordered"

# mean over the scored tokens of every row; the lower, the more it should be in distribution
Scores = dict[str, Tensor]


# ---- texts -----------------------------------------------------------------------------------------------------


def _shuffled_words(text: str, draw: random.Random) -> str:
    words = text.split(" ")
    draw.shuffle(words)
    return " ".join(words)


def _shuffled_characters(text: str, draw: random.Random) -> str:
    return "".join(draw.sample(text, len(text)))


def _code() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def _questions(path: Path) -> str:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return "\n".join(f"{row['question']}\n{row['answer']}" for row in rows)


def sources(data: Path | None) -> tuple[str, dict[str, tuple[str, Callable[[str, random.Random], str] | None]]]:
    """The text in distribution, and by name those out of it, with what is done to every piece."""
    test = shakespeare_splits()["test"]
    known, other = test[: len(test) // 2], test[len(test) // 2 :]
    found: dict[str, tuple[str, Any]] = {
        "shuffled words": (other, _shuffled_words),
        "shuffled characters": (other, _shuffled_characters),
        "Python": (_code(), None),
    }
    if data is not None:
        found["WikiText"] = ((data / WIKITEXT).read_text(encoding="utf-8"), None)
        found["GSM8K"] = (_questions(data / GSM8K), None)
    return known, found


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    count: int,
    tokens: int,
    draw: random.Random,
    change: Callable[[str, random.Random], str] | None = None,
) -> Tensor:
    """Tokens (count, tokens) from the beginnings of lines drawn at random, behind a start token."""
    rows: list[list[int]] = []
    while len(rows) < count:
        begin = text.find("\n", draw.randrange(len(text) - CHARACTERS * tokens)) + 1
        part = text[begin : begin + CHARACTERS * tokens]
        ids = tokenizer(part if change is None else change(part, draw), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if begin and len(ids) >= tokens:
            rows.append([tokenizer.bos_token_id, *ids[:tokens]])
    return torch.tensor(rows)


# ---- scores ----------------------------------------------------------------------------------------------------


def _nats(logits: Tensor, tokens: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def energy_scores(
    model: EBTForCausalLM, rows: Tensor, steps: int, landscape: int | None, others: Tensor
) -> dict[str, Tensor]:
    """
    What the model says about every token (B, S - 1) of (B, S), after so many steps of thinking.

    `others` (M, S - 1) are tokens drawn from the vocabulary, with which a token is compared in its position.
    """
    context, tokens = rows[:, :-1], rows[:, 1:]
    output = model(context, thinking_steps=steps, output_energies=True)
    probs = output.logits.softmax(-1)

    def energy(**candidates: Tensor) -> Tensor:
        return model.energy(context, landscape=landscape, **candidates)

    token, predicted = energy(candidate_ids=tokens), energy(candidate_probs=probs)
    likeliest = energy(candidate_ids=probs.argmax(-1))
    drawn = energy(candidate_ids=others.expand(len(rows), -1, -1))
    every = torch.cat([drawn, token[:, None]], 1)
    return {
        f"nats, {of_steps(steps)}": _nats(output.logits, tokens),
        "E(token)": token,
        "E(prediction)": predicted,
        "less energy gap": output.energies[..., -1] - output.energies[..., 0],
        "E(token) - E(prediction)": token - predicted,
        "E(token) - E(likeliest token)": token - likeliest,
        "E(token) - mean over vocabulary": token - drawn.mean(1),
        "E(token) - lowest of vocabulary": token - drawn.amin(1),
        "softmax of -E over vocabulary, nats": token + (-every).logsumexp(1),
        "share of vocabulary with lower E": (drawn < token[:, None]).float().mean(1),
        "mean E of vocabulary (blind)": drawn.mean(1),
        "entropy of prediction (blind)": torch.special.entr(probs).sum(-1),
    }


class Judge:
    """
    All scores of rows of tokens.

    Args:
        options (`argparse.Namespace`): of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = EBTForCausalLM.from_pretrained(options.ebt).eval().to(options.device)
        self.tokenizer = AutoTokenizer.from_pretrained(options.ebt)
        self.twin: PreTrainedModel | None = None
        if options.twin is not None:
            self.twin = AutoModelForCausalLM.from_pretrained(options.twin).eval().to(options.device)

    @torch.no_grad()
    def __call__(self, rows: Tensor, seed: int, first: int = 1) -> Scores:
        """Means (B,) over the tokens from `first` on, by the name of the score."""
        options, vocabulary = self.options, self.model.config.vocab_size
        generator = torch.Generator().manual_seed(seed)
        others = torch.randint(vocabulary, (options.vocabulary, rows.shape[1] - 1), generator=generator)
        parts: dict[str, list[Tensor]] = {}
        for batch in rows.to(options.device).split(options.batch_size):
            found = energy_scores(self.model, batch, options.steps, options.landscape, others.to(options.device))
            if self.twin is not None:
                found = {TWIN: _nats(self.twin(batch[:, :-1]).logits, batch[:, 1:]), **found}
            for name, values in found.items():
                parts.setdefault(name, []).append(values[:, first - 1 :].mean(1).cpu())
        return {name: torch.cat(values) for name, values in parts.items()}


# ---- the two questions -----------------------------------------------------------------------------------------


def detection(judge: Judge, seed: int, tokens: int) -> list[dict[str, Any]]:
    """For every text out of distribution, the area under the ROC of every score against that in it."""
    options, draw = judge.options, random.Random(seed)
    auroc = evaluate.load(metric_path("ebt_energy_auroc"), keep_in_memory=True)
    known, unknown = sources(options.data)
    inside = judge(pieces(judge.tokenizer, known, options.pieces, tokens, draw), seed)
    rows = []
    for name, (text, change) in unknown.items():
        outside = judge(pieces(judge.tokenizer, text, options.pieces, tokens, draw, change), seed)
        labels = [0] * options.pieces + [1] * options.pieces
        values = {
            score: auroc.compute(predictions=torch.cat([inside[score], outside[score]]), references=labels)
            for score in inside
        }
        rows.append(
            {
                "set": name,
                "auroc": {score: value["energy_auroc"] for score, value in values.items()},
                "means": {score: [x[score].mean().item() for x in (inside, outside)] for score in inside},
            }
        )
    return rows


def choice(judge: Judge, seed: int, tokens: int) -> list[dict[str, Any]]:
    """How often every score is lowest for the true continuation of four: of `tokens` tokens, after twice as many."""
    options, draw = judge.options, random.Random(seed)
    known, _ = sources(None)
    first = 2 * tokens + 1
    texts = pieces(judge.tokenizer, known, options.pieces, 3 * tokens, draw)
    prompts, true = texts[:, :first], texts[:, first:]
    wrong: dict[str, list[Tensor]] = {ELSEWHERE: [], REORDERED: []}
    for number in range(3):
        wrong[ELSEWHERE].append(true.roll(number + 1, 0))
        wrong[REORDERED].append(true[:, torch.tensor(draw.sample(range(tokens), tokens))])
    right = judge(texts, seed, first)
    scores = {
        name: [judge(torch.cat([prompts, kind], 1), seed, first) for kind in kinds] for name, kinds in wrong.items()
    }
    return [
        {
            "set": name,
            "accuracy": {
                score: (right[score] < torch.stack([one[score] for one in others]).amin(0)).float().mean().item()
                for score in right
            },
        }
        for name, others in scores.items()
    ]


QUESTIONS: dict[str, Callable[[Judge, int, int], list[dict[str, Any]]]] = {"auroc": detection, "accuracy": choice}


# ---- reporting -------------------------------------------------------------------------------------------------


def summary(results: Results, question: str, tokens: int, seeds: Sequence[int]) -> tuple[list[str], dict[str, Any]]:
    """The names of the sets, and by score and set the values of all seeds."""
    rows = [results.find(question=question, tokens=tokens, seed=seed)["rows"] for seed in seeds]
    sets = [row["set"] for row in rows[0]]
    scores = {
        score: {name: [of_seed[at][question][score] for of_seed in rows] for at, name in enumerate(sets)}
        for score in rows[0][0][question]
    }
    return sets, scores


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def lines_of(scores: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """A row for every score: all sets, and the mean over them."""
    return [
        [score, *map(_cell, by_set.values()), f"{statistics.fmean(sum(by_set.values(), [])):.3f}"]
        for score, by_set in scores.items()
    ]


def draw_plot(path: Path, shown: dict[int, tuple[list[str], dict[str, dict[str, list[float]]]]]) -> None:
    """A panel for every length: the scores from the best on, a mark for every set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(shown) + 2, 5), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, (tokens, (sets, scores)) in zip(axes, shown.items(), strict=True):
        for marker, name in zip("os^Dv", sets, strict=False):
            axis.plot([statistics.fmean(by[name]) for by in scores.values()], list(scores), marker, label=name)
        axis.axvline(0.5, color="grey", linestyle=":")
        axis.set(title=f"{tokens} tokens", xlabel="AUROC (0.5: guessing)")
        axis.grid(axis="y", alpha=0.3)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME, text_models=False)
    parser.add_argument("--ebt", type=Path, default=checkpoint_path(), help="a checkpoint (default: the shipped one)")
    parser.add_argument("--twin", type=Path, help="an ordinary language model with the same tokenizer")
    parser.add_argument("--data", type=Path, help="folder with text/wikitext2_valid_test/ and qa/gsm8k/")
    parser.add_argument("--pieces", type=int, default=100, help="of every text")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 64], help="lengths of the pieces")
    parser.add_argument("--continuation", type=int, default=16, help="tokens to choose, after twice as many")
    parser.add_argument("--steps", type=int, default=2, help="thinking steps")
    parser.add_argument("--landscape", type=int, help="which gives the energies (default: the last)")
    parser.add_argument("--vocabulary", type=int, default=32, help="tokens of the vocabulary to compare with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=10)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    """Measures, draws, prints the tables and writes them down."""
    options = parse(argv)
    names = ("ebt", "twin", "pieces", "steps", "landscape", "vocabulary")
    settings = machine_settings(options) | {name: getattr(options, name) for name in names}
    settings |= {name: settings[name] and Path(settings[name]).name for name in ("ebt", "twin")}
    results = Results(options.results, settings | {"data": options.data is not None}, options.fresh)
    judge = Judge(options)
    wanted = [("auroc", tokens) for tokens in options.tokens] + [("accuracy", options.continuation)]
    for question, tokens in tqdm(wanted, desc="lengths"):
        for seed in options.seeds:
            key = {"question": question, "tokens": tokens, "seed": seed}
            if results.find(**key) is None:
                results.append({**key, "rows": QUESTIONS[question](judge, seed, tokens)})
    shown = {tokens: summary(results, "auroc", tokens, options.seeds) for tokens in options.tokens}
    plot = options.results.with_suffix(".png")
    draw_plot(plot, shown)
    more = []
    for tokens, (sets, scores) in list(shown.items())[1:]:
        more += [f"## AUROC, {tokens} tokens", table(["score", *sets, "mean"], lines_of(scores))]
    sets, scores = summary(results, "accuracy", options.continuation, options.seeds)
    more += [
        f"## The true continuation among four: accuracy, {options.continuation} tokens",
        f"After a prompt of {2 * options.continuation} tokens of the test part; guessing is right in a quarter.",
        table(["score", *sets, "mean"], lines_of(scores)),
        f"![AUROC of every score]({plot.name})",
    ]
    (tokens, (sets, scores)), *_ = shown.items()
    return report(
        results,
        "Scores by energy and by likelihood",
        command_line(NAME, sys.argv[1:] if argv is None else argv),
        ["score", *sets, "mean"],
        lines_of(scores),
        f"AUROC of {options.pieces} pieces of the test part of Tiny Shakespeare against as many of each set, "
        f"{tokens} tokens each (others below); mean over the tokens of a piece; mean ± standard deviation of "
        f"{len(options.seeds)} draws of pieces. 1: every piece out of distribution scores higher; 0.5: guessing; "
        f"below: the wrong way round. {of_steps(options.steps)} of thinking. Vocabulary: {options.vocabulary} tokens "
        "drawn at random for every position. Blind: scores that do not look at the token.",
        seed=f"{', '.join(map(str, options.seeds))} (of the pieces)",
        more=more,
    )


if __name__ == "__main__":
    main()
