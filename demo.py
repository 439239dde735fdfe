"""
The demonstration behind `ebt demo`: what thinking does to text, speed, energy and perplexity, on the embedded model.

Everything printed is measured on the spot, but for the Transformer++ twin: its model is not shipped, and its recorded
loss is read from the checkpoint's `results.json`.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .reporting import of_steps, table


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PICTURE = "energy_by_steps.png"
NUMBERS = "demo.json"
RESULTS = "results.json"
PICTURE_BLOCKS = 8
QUANTILES = (0.1, 0.9)


@dataclass
class Sample:
    """Text generated with one number of thinking steps; `mean_energies` before every step and after the last."""

    steps: int
    text: str
    tokens_per_second: float
    mean_energies: list[float]


@dataclass
class DemoReport:
    """
    What the demonstration found.

    Args:
        prompt (`str`): what the samples continue.
        samples (`list[Sample]`): one per number of steps.
        perplexities (`dict[int, float]`): held-out perplexity per number of steps.
        blocks, all_blocks (`int`): blocks of the test split it was measured on, and all there are.
        twin_perplexity (`float`, *optional*): recorded with the checkpoint, on the whole test split.
        picture (`str`, *optional*): the plot of energy against steps.
        seconds (`float`): how long it all took.
    """

    prompt: str
    samples: list[Sample] = field(default_factory=list)
    perplexities: dict[int, float] = field(default_factory=dict)
    blocks: int = 0
    all_blocks: int = 0
    twin_perplexity: float | None = None
    picture: str | None = None
    seconds: float = 0.0


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def find_checkpoint(source: str | Path | None, embedded: Path) -> str | Path:
    """
    What to load: the source, or the embedded checkpoint where there is none.

    Raises:
        FileNotFoundError: if the source is a folder that is not there, or the embedded checkpoint has no weights.
    """
    if source is None:
        if not (embedded / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"The embedded checkpoint has no weights in {embedded}. Give another with --model."
            )
        return embedded
    if _looks_like_path(str(source)) and not Path(source).is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {source}.")
    return source


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """No progress bars while a checkpoint is loaded; whatever goes wrong becomes one `ValueError` with the reason."""
    import transformers

    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # whatever a wrong or broken checkpoint makes the libraries underneath raise
        where = "the folder" if Path(source).is_dir() else "no such folder here, and from the Hub"
        raise ValueError(f"Cannot load {str(source)!r} ({where}): {error}") from error
    finally:
        if bar:
            transformers.utils.logging.enable_progress_bar()


def load_checkpoint(source: str | Path | None = None) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """
    Model (in evaluation mode) and tokenizer of a checkpoint.

    Args:
        source (`str` or `Path`, *optional*): a folder or a Hub id; `None` means the embedded checkpoint.

    Raises:
        FileNotFoundError: if the embedded checkpoint is not there.
        ValueError: if there is no such checkpoint or it cannot be read, with the reason.
    """
    from .assets import checkpoint_path

    source = find_checkpoint(source, checkpoint_path())
    import transformers

    with loading(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    return model, tokenizer


@contextmanager
def one_thread() -> Iterator[None]:
    """
    Matrices of a small model are too small to share out: a second thread gains nothing, and loses a lot of time at
    every operation where other programs keep the processor busy.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sample(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, steps: int, seed: int, **options: Any
) -> Sample:
    import torch

    from .pipelines import generate_with_energies

    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(**encoded, thinking_steps=steps, **options)
    seconds = time.perf_counter() - started
    new = output.shape[1] - encoded["input_ids"].shape[1]
    torch.manual_seed(seed)  # the same text again, this time with its energies (a forward more per token)
    (thoughtful,) = generate_with_energies(model, tokenizer, prompt, thinking_steps=steps, **options)
    energies = torch.tensor([token.energies for token in thoughtful.tokens]).mean(0).tolist()
    return Sample(steps, thoughtful.text, new / seconds, energies)


def _held_out_energies(
    model: "PreTrainedModel", blocks: Sequence[Any], steps: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Energies (positions, K + 1) on held-out text, and the loss of each position after the last step."""
    import torch
    from torch.nn import functional as F

    energies, losses = [], []
    for block in blocks[:PICTURE_BLOCKS]:
        ids = block["input_ids"][block["labels"] != -100][None].to(model.device)
        with torch.no_grad():
            output = model(input_ids=ids, thinking_steps=steps, output_energies=True, use_cache=False)
        energies.append(output.energies[0, :-1].cpu())
        losses.append(F.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="none").cpu())
    return torch.cat(energies), torch.cat(losses)


def finish_axes(axes: Any, steps: range, landscapes: int = 1) -> None:
    """
    What every plot against thinking steps has: ticks, a grid, a legend, and where the walk changes its landscape.

    Args:
        axes (`matplotlib.axes.Axes`): what has been drawn on.
        steps (`range`): the numbers of steps on it.
        landscapes (`int`, *optional*, defaults to 1): energy landscapes of the model; the first steps walk one each.
    """
    changes = [step for step in steps[1:] if step < landscapes]
    for step in changes:
        label = "landscape changes" if step == changes[0] else None
        axes.axvline(step - 0.5, color="grey", linestyle=":", label=label)
    axes.set_xlabel("thinking steps taken")
    axes.set_xticks(steps)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_energies(energies: "torch.Tensor", losses: "torch.Tensor", landscapes: int, path: Path) -> None:
    """
    Plots energy against thinking steps.

    Args:
        energies (`Tensor` of shape `(positions, K + 1)`): before every step and after the last.
        losses (`Tensor` of shape `(positions,)`): tells easy tokens from hard ones.
        landscapes (`int`): energy landscapes of the model; the first steps walk one each.
        path (`Path`): the picture to write.

    Raises:
        ImportError: without matplotlib.
    """
    import torch
    from matplotlib.figure import Figure

    count = energies.shape[1]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)

    def band(axes: Any, values: "torch.Tensor", first: int, label: str) -> None:
        steps = range(first, first + values.shape[1])
        (line,) = axes.plot(steps, values.mean(0), marker="o", label=label)
        low, high = torch.quantile(values, torch.tensor(QUANTILES), dim=0)
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())

    band(left, energies, 0, "all tokens")
    left.set_title("Energy of the prediction (mean, 10-90 % band)")
    left.set_ylabel("energy")
    # energies of different landscapes cannot be compared: what a step gains is shown on the last one only
    first = landscapes - 1 if count - landscapes >= 1 else 0
    change = energies[:, first:] - energies[:, first : first + 1]
    order = losses.argsort()
    third = max(1, len(order) // 3)
    band(right, change[order[:third]], first, "easiest third")
    band(right, change[order[-third:]], first, "hardest third")
    right.set_title("Change of energy, easy and hard tokens")
    right.set_ylabel(f"energy - energy at step {first}")
    finish_axes(left, range(count), landscapes)
    finish_axes(right, range(first, count), landscapes)
    figure.savefig(path, dpi=120)


def recorded_twin_perplexity(source: str | Path | None) -> float | None:
    """The twin's test perplexity from a checkpoint's `results.json`; `None` where there is none."""
    from .assets import checkpoint_path

    path = (checkpoint_path() if source is None else Path(source)) / RESULTS
    if not path.is_file():
        return None
    loss = json.loads(path.read_text(encoding="utf-8")).get("twin", {}).get("test_loss")
    return None if loss is None else math.exp(loss)


def verdict(report: DemoReport) -> str:
    """What the numbers say about thinking longer, and about the twin."""
    found = report.perplexities
    best = min(found, key=lambda count: found[count])

    def off(value: float, reference: float) -> str:
        percent = 100 * (value / reference - 1)
        return f"{abs(percent):.1f} % {'higher' if percent >= 0 else 'lower'}"

    others = ", ".join(f"{of_steps(count)} {off(found[count], found[best])}" for count in found if count != best)
    text = f"On held-out text {of_steps(best)} predicted best: perplexity {found[best]:.2f}"
    text += f" ({others})." if others else "."
    counts = sorted(found)
    if len(counts) > 1:
        if best == counts[-1]:
            text += " Thinking longer helped all the way."
        elif best == counts[0]:
            text += " Thinking longer did not help this model."
        else:
            text += f" Thinking longer helped up to {of_steps(best)} and hurt beyond."
    if report.twin_perplexity is not None:
        text += (
            f" That is {off(found[best], report.twin_perplexity)} than the {report.twin_perplexity:.2f} recorded for "
            "the Transformer++ twin"
        )
        text += "." if report.blocks == report.all_blocks else " on the whole test split."
    return text


def _energy_table(samples: Sequence[Sample]) -> str:
    longest = max(len(sample.mean_energies) for sample in samples)
    header = ["steps", "start", *(f"after {count}" for count in range(1, longest))]
    rows = [
        [str(sample.steps), *(f"{energy:.3f}" for energy in sample.mean_energies)]
        + [""] * (longest - len(sample.mean_energies))
        for sample in samples
    ]
    return table(header, rows)


def run_demo(
    model: str | None = None,
    prompt: str = "ROMEO:\n",
    steps: Sequence[int] | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    blocks: int = 0,
    output_dir: str = "ebt_demo",
    say: Callable[[str], None] = print,
) -> DemoReport:
    """
    Runs the demonstration.

    Args:
        model (`str`, *optional*): another checkpoint than the embedded one.
        prompt (`str`, *optional*): what to continue.
        steps (sequence of `int`, *optional*): the numbers of thinking steps to compare. 1, 2, 4 and 8 by default, and
            first 0 for models that start at a prediction of their own, the only ones to have it.
        max_new_tokens, temperature, top_k, seed: of the sampled text.
        blocks (`int`, *optional*, defaults to 0): blocks of the test split to measure on; 0 means all.
        output_dir (`str`, *optional*): where the picture and the numbers go.
        say (`Callable`, *optional*): takes what is to be printed.

    Raises:
        ValueError, FileNotFoundError: for a checkpoint that cannot be loaded or has no energies, and for bad options.
    """
    from transformers.utils.logging import tqdm

    from .pipelines.perplexity import default_steps, fewest_steps, perplexity_by_steps
    from .pipelines.text_generation import check_room
    from .training.data import held_out_blocks

    if max_new_tokens < 1 or blocks < 0:
        raise ValueError(
            f"`max_new_tokens` must be at least 1 and `blocks` at least 0, got {max_new_tokens}, {blocks}."
        )
    started = time.perf_counter()
    network, tokenizer = load_checkpoint(model)
    if not hasattr(network, "energy"):
        raise ValueError(f"{type(network).__name__} is no energy-based model: it does not think in steps.")
    steps, fewest = sorted(set(default_steps(network) if steps is None else steps)), fewest_steps(network)
    if not steps or steps[0] < fewest:
        raise ValueError(f"`steps` must be integers of at least {fewest} for this model, got {steps}.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = network.config
    check_room(network, len(tokenizer(prompt)["input_ids"]), max_new_tokens)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    say(
        f"{'The embedded model' if model is None else model}: {parameters / 1e6:.2f} M parameters, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary of {config.vocab_size}, "
        f"{config.num_landscapes} energy landscape(s), trained to think {config.default_thinking().steps} step(s)."
    )
    report = DemoReport(prompt=prompt)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "max_new_tokens": max_new_tokens}
    with one_thread():
        for count in tqdm(steps, desc="Generating", unit="text"):
            report.samples.append(_sample(network, tokenizer, prompt, count, seed, **sampling))
    for sample in report.samples:
        say(f"\n--- {sample.steps} thinking step{'s' if sample.steps != 1 else ''} " + "-" * 50)
        say(prompt + sample.text)
    say("\nMean energy of the generated tokens' predictions (steps on different landscapes are not comparable):\n")
    say(_energy_table(report.samples))

    held_out = held_out_blocks(tokenizer, min(256, config.max_position_embeddings))
    chosen, report.all_blocks = held_out[: blocks or None], len(held_out)
    report.blocks = len(chosen)
    report.perplexities = perplexity_by_steps(network, chosen, steps)
    report.twin_perplexity = recorded_twin_perplexity(model)
    rows = [
        [str(sample.steps), f"{report.perplexities[sample.steps]:.2f}", f"{sample.tokens_per_second:.0f}"]
        for sample in report.samples
    ]
    if report.twin_perplexity is not None:
        rows.append(["twin (recorded)", f"{report.twin_perplexity:.2f}", ""])
    say(
        f"\nPerplexity on {report.blocks} of the {report.all_blocks} held-out blocks of Tiny Shakespeare, and the "
        "speed of the samples above:\n"
    )
    say(table(["thinking steps", "perplexity", "tokens/s"], rows))
    if steps[0] == 0:
        say("\n0 steps: what the model starts from, its prediction as an ordinary language model.")
    say("\n" + verdict(report))

    try:
        energies, losses = _held_out_energies(network, chosen, steps[-1])
        draw_energies(energies, losses, config.num_landscapes, folder / PICTURE)
        report.picture = str(folder / PICTURE)
        say(f"\nEnergy against steps: {report.picture}")
    except ImportError:
        say("\nNo picture: it needs matplotlib (pip install 'ebt-transformers[plot]').")
    report.seconds = time.perf_counter() - started
    numbers = json.dumps({**asdict(report), "model": model or "embedded", "seed": seed}, indent=2)
    (folder / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
    say(f"All numbers: {folder / NUMBERS} ({report.seconds:.0f} s in all)")
    return report


__all__ = ["DemoReport", "Sample", "draw_energies", "load_checkpoint", "run_demo", "verdict"]
