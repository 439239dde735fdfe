"""The options of the sub-commands of `ebt`, as dataclasses that `HfArgumentParser` makes a command line of."""

from dataclasses import dataclass, field

from .assets import example_picture_path


STEPS_HELP = (
    "Thinking steps for each; 0 (the start itself) for models that start at a prediction. Default of this and the "
    "next: the checkpoint's."
)


@dataclass
class DemoArguments:
    """What thinking does: to text, its speed and perplexity; with --image to a noisy picture; with --web to both."""

    image: str | None = field(
        default=None,
        metadata={
            **{"nargs": "?", "const": str(example_picture_path()), "metavar": "PICTURE"},
            "help": "Denoise a picture instead of writing text: this file, or without a name an embedded one.",
        },
    )
    web: bool = field(
        default=False, metadata={"help": "Serve both as pages to a browser on this machine: every step can be seen."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Another checkpoint than the embedded one: a folder or a Hub id."}
    )
    image_model: str | None = field(default=None, metadata={"help": "Web: the same for the model of pictures."})
    port: int | None = field(default=None, metadata={"help": "Web: port. Default: the first free one from 7860."})
    share: bool = field(
        default=False,
        metadata={"help": "Web: also under a public address, through Gradio's servers. Default: this machine alone."},
    )
    steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of thinking steps to compare. Default: 1 2 4 8, of pictures 1 2 3 4 8; first 0 for "
            "models that start at a prediction (candidate_init proposal)."
        },
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of the sampled text, or of the noise. Default: 0."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where pictures and numbers go. Default: ebt_demo."}
    )
    levels: list[float] | None = field(
        default=None,
        metadata={"help": "Pictures: noise levels, above 0 and up to 1 (pure noise). Default: 0.1 0.2."},
    )
    prompt: str | None = field(default=None, metadata={"help": "Text: what to continue. Default: ROMEO:"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Text: length of each sample in tokens. Default: 100."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Text: temperature of the samples. Default: 0.8."}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Text: sample from the so many likeliest tokens. Default: 50."}
    )
    blocks: int | None = field(
        default=None, metadata={"help": "Text: held-out blocks to measure perplexity on; 0 (default) means all."}
    )


@dataclass
class ThinkingArguments:
    """How long and how to think about a token, or about a picture."""

    thinking_steps: int | None = field(default=None, metadata={"help": STEPS_HELP})
    thinking_candidates: int | None = field(
        default=None, metadata={"help": "Candidates descended side by side; the best is kept."}
    )
    thinking_selection: str | None = field(
        default=None, metadata={"help": "How the best is chosen: min_energy, max_gap or max_energy."}
    )
    thinking_step_size_scale: float | None = field(default=None, metadata={"help": "Factor on the step size."})
    thinking_noise_std: float | None = field(default=None, metadata={"help": "Noise before every thinking step."})
    thinking_tolerance: float | None = field(
        default=None, metadata={"help": "Stop thinking about one when its energy changes by no more than this."}
    )
    thinking_kl_tolerance: float | None = field(
        default=None,
        metadata={"help": "Text: stop when a step changes the distribution by no more than this (KL, in nats)."},
    )
    thinking_target_energy: float | None = field(
        default=None, metadata={"help": "Stop thinking about one when its energy is at most this."}
    )
    thinking_budget: int | None = field(
        default=None, metadata={"help": "Text: steps for all new tokens together; then each gets one."}
    )
    thinking_prune_keep: int | None = field(
        default=None, metadata={"help": "Only the so many best candidates go on after --thinking_prune_after steps."}
    )
    thinking_prune_after: int | None = field(
        default=None, metadata={"help": "Steps that all candidates take before that. Default: 1."}
    )
    thinking_accept_only_lower_energy: bool = field(
        default=False, metadata={"help": "Take a step only where it lowers the energy."}
    )
    thinking_seed: int | None = field(default=None, metadata={"help": "Seed of random candidates and noise."})


@dataclass
class GenerateArguments(ThinkingArguments):
    """Continues a text, thinking about every token."""

    model: str | None = field(
        default=None, metadata={"help": "Checkpoint: a folder or a Hub id. Default: the embedded one."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "How many tokens to generate at most. Default: 100, or what fits the context."}
    )
    sample: bool = field(default=False, metadata={"help": "Sample tokens instead of taking the likeliest."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature, with --sample."})
    top_k: int | None = field(default=None, metadata={"help": "Sample from the so many likeliest, with --sample."})
    top_p: float | None = field(default=None, metadata={"help": "Sample from this share of mass, with --sample."})
    seed: int = field(default=0, metadata={"help": "Random seed, with --sample."})
    output_energies: bool = field(default=False, metadata={"help": "Report the energies of every token."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of text."})
    stream: bool = field(default=False, metadata={"help": "Print the text while it is being generated."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... Default: cuda where there is one."})


@dataclass
class ScoreArguments(ThinkingArguments):
    """Scores texts by energy and likelihood, or ranks them as continuations of a prompt; lower fits better."""

    thinking_steps: int | None = field(
        default=None,
        metadata={"aliases": ["--steps"], "help": STEPS_HELP},
    )
    model: str | None = field(
        default=None, metadata={"help": "Checkpoint: a folder or a Hub id. Default: the embedded one."}
    )
    file: list[str] | None = field(
        default=None, metadata={"help": "Score what these files hold, instead of TEXT; - reads standard input."}
    )
    lines: bool = field(default=False, metadata={"help": "With --file: every line that is not blank is a text."})
    prompt: str | None = field(default=None, metadata={"help": "The texts continue this, and are ranked."})
    score_by: str = field(
        default="relative_energy", metadata={"help": "What is the score: relative_energy, energy or likelihood."}
    )
    reduction: str = field(default="mean", metadata={"help": "Of a text: the mean or the sum over its tokens."})
    landscape: int | None = field(default=None, metadata={"help": "Which gives the energies. Default: the last."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of context. Default: the model's."})
    batch_size: int = field(default=8, metadata={"help": "Texts, or windows of them, that are scored at once."})
    output_tokens: bool = field(default=False, metadata={"help": "Report every token."})
    json: bool = field(default=False, metadata={"help": "Print JSON: an object for each text, or for the prompt."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... Default: cuda where there is one."})


@dataclass
class DenoiseArguments(ThinkingArguments):
    """Denoises pictures, thinking about each, and writes them as PNG files."""

    model: str | None = field(default=None, metadata={"help": "Checkpoint: a folder or a Hub id. Needed."})
    output_dir: str = field(default="denoised", metadata={"help": "Where the denoised pictures go."})
    noise_std: float | None = field(
        default=None,
        metadata={"help": "Strength of the noise the pictures have, as a standard deviation in units of 0 to 255."},
    )
    add_noise_level: float | None = field(
        default=None,
        metadata={
            "help": "First add noise, this share (0 to 1) of the way to pure noise; writes NAME_noisy.png, too."
        },
    )
    noise_seed: int = field(default=0, metadata={"help": "Seed of that noise."})
    tile_size: int | None = field(
        default=None,
        metadata={"help": "Side of the tiles of large pictures; 0: no tiles. Default: what the model was made for."},
    )
    tile_overlap: int | None = field(
        default=None, metadata={"help": "Rows and columns shared by tiles. Default: a quarter of a tile."}
    )
    batch_size: int = field(default=1, metadata={"help": "Pictures or tiles that go through the model at once."})
    output_energies: bool = field(default=False, metadata={"help": "Report the energies of every picture."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object for each picture instead of text."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... Default: cuda where there is one."})


@dataclass
class ConvertArguments:
    """Turns a checkpoint of the official code into a folder that from_pretrained() loads."""

    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Tokenizer to put beside the model: a folder or a Hub id. Default: the one it names."},
    )


__all__ = [
    "ConvertArguments",
    "DemoArguments",
    "DenoiseArguments",
    "GenerateArguments",
    "ScoreArguments",
    "ThinkingArguments",
]
