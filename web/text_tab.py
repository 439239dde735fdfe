"""The tab "Text": writes text, and shows the thinking behind every token."""

from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import ThinkingConfig
from ..pipelines.perplexity import fewest_steps
from ..pipelines.text_generation import room_for
from ..reporting import of_steps
from .parts import MOST_STEPS, ONE_AT_A_TIME, PRIVATE, about_model, as_message, gr, threads_for
from .plots import draw_distributions, draw_energies_of_candidates, quoted
from .text import WatchedText, WatchedToken, stream_text, watch_token


MOST_CANDIDATES, MOST_NEW_TOKENS = 8, 200
LAST = "on the last landscape"
TOKEN_COLUMNS = ("", "token", "energy at the start", f"first {LAST}", "at the end", "steps taken", "entropy in nats")


def token_rows(tokens: Sequence[WatchedToken], first: int) -> list[list[Any]]:
    """The table of tokens: a row for each, with the columns `TOKEN_COLUMNS`; `first` counts energies."""
    return [
        [
            number,
            quoted(token.text),
            *(f"{token.energies[index]:.4f}" for index in (0, first, -1)),
            token.steps_taken,
            f"{token.entropy:.3f}",
        ]
        for number, token in enumerate(tokens, 1)
    ]


def about_token(text: WatchedText, index: int, first: int) -> str:
    """One line on a token: its energy from the start to the end, and how sure the model ended up."""
    token = text.tokens[index]
    energies = f"energy {token.energies[first]:.4f} → {token.energies[-1]:.4f}"
    if len(token.energies) == 1:
        energies = f"energy {token.energies[0]:.4f}"
    if first:
        energies = f"energy {token.energies[0]:.4f} at the start; {LAST} {energies.removeprefix('energy ')}"
    return (
        f"Token {index + 1} of {len(text.tokens)}: **`{quoted(token.text)}`**, {energies}; "
        f"{of_steps(token.steps_taken)}, entropy at the end {token.entropy:.3f} nats"
    )


class TextTab:
    """
    The tab that writes text and shows the thinking behind every token. What a visitor has generated is in that
    visitor's own `gr.State`; the model is shared, and serves one at a time.

    Args:
        model ([`EBTForCausalLM`]), tokenizer: the model.
        source (`str`, *optional*): where it comes from, to be shown.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> None:
        if not hasattr(model, "energy"):
            raise ValueError(f"{type(model).__name__} is no energy-based model: it does not think in steps.")
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self._stops: dict[str | None, Event] = {}  # of the text that a visitor is waiting for

    def generate(
        self,
        prompt: str,
        steps: int,
        candidates: int,
        noise: float,
        scale: float,
        new: int,
        temperature: float,
        seed: int,
        request: gr.Request | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Yields updates of `outputs`: the growing text, then everything about it. `request` says who asks."""
        visitor = None if request is None else request.session_hash
        stop = self._stops[visitor] = Event()
        try:
            with as_message(), threads_for(self.model):
                thinking = ThinkingConfig(
                    steps=int(steps),
                    candidates=int(candidates),
                    noise_std=float(noise),
                    step_size_scale=float(scale),
                    seed=int(seed),
                )
                options = {"max_new_tokens": int(new), "temperature": float(temperature) or None, "seed": int(seed)}
                cleared: tuple[Any, ...] = ([], [], gr.update(interactive=False), "Thinking ...", None, None)
                for found in stream_text(self.model, self.tokenizer, prompt, thinking, stop, **options):
                    if isinstance(found, str):
                        yield (None, found, *cleared)
                        cleared = (gr.skip(),) * len(cleared)
                    else:
                        yield self._result(found)
        finally:
            self._stops.pop(visitor, None)

    def stop(self, request: gr.Request) -> None:
        """Ends the text of a visitor with the token under way."""
        if request.session_hash in self._stops:
            self._stops[request.session_hash].set()

    def _result(self, text: WatchedText) -> tuple[Any, ...]:
        chips = [(token.text.replace("\n", "↵"), token.entropy / self._most_entropy) for token in text.tokens]
        number = gr.update(maximum=max(2, len(text.tokens)), value=1, interactive=len(text.tokens) > 1)
        return (
            text,
            text.text,
            chips,
            token_rows(text.tokens, text.first_on_last_landscape),
            number,
            *self.show(text, 1),
        )

    @property
    def _most_entropy(self) -> float:
        return float(torch.tensor(self.model.config.vocab_size).log())

    def show(self, text: WatchedText | None, number: float) -> tuple[Any, ...]:
        """What belongs to one token, counted from 1: a line, the distributions, the energies."""
        index = int(number) - 1
        if text is None or not 0 <= index < len(text.tokens):
            return (gr.skip(),) * 3
        with as_message(), threads_for(self.model):
            walk = watch_token(self.model, text, index)
        first = text.first_on_last_landscape
        return (
            about_token(text, index, first),
            draw_distributions(walk, text.tokens[index].token, lambda token: self.tokenizer.decode([token])),
            draw_energies_of_candidates(walk, first),
        )

    def build(self) -> None:
        """Lays out the tab, inside of a `gr.Blocks`."""
        default = self.model.config.default_thinking().steps
        state = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox("ROMEO:\n", label="Prompt", lines=3, elem_id="prompt")
                fewest = fewest_steps(self.model)
                steps = gr.Slider(
                    *(fewest, MOST_STEPS, max(4, default)),
                    step=1,
                    label="Thinking steps",
                    info="0 is an ordinary language model: what thinking starts from." if fewest == 0 else None,
                    elem_id="steps",
                )
                candidates = gr.Slider(1, MOST_CANDIDATES, 1, step=1, label="Candidates", elem_id="candidates")
                new = gr.Slider(1, self._most_new, min(40, self._most_new), step=1, label="New tokens", elem_id="new")
                temperature = gr.Slider(
                    *(0, 2, 0),
                    step=0.1,
                    label="Temperature",
                    info="0 takes the likeliest token every time; above 0 samples.",
                    elem_id="temperature",
                )
                with gr.Accordion("More about thinking", open=False):
                    noise = gr.Slider(0, 3, 0, step=0.1, label="Noise before every step", elem_id="noise")
                    scale = gr.Slider(0.1, 4, 1, step=0.1, label="Factor on the step size", elem_id="scale")
                    seed = gr.Number(0, minimum=0, precision=0, label="Seed of candidates, noise and sampling")
                with gr.Row():
                    button = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=2, min_width=420):
                shown = gr.Textbox(label="Continuation", lines=7, interactive=False, elem_id="continuation")
                chips = gr.HighlightedText(
                    label="Its tokens: click one. The redder, the less sure the model was of it.",
                    show_whitespaces=True,
                    show_inline_category=False,
                    elem_id="tokens",
                )
                number = gr.Slider(1, 2, 1, step=1, label="Token", interactive=False, elem_id="number")
        line = gr.Markdown("Generate a text to see how each of its tokens was found.", elem_id="token_line")
        with gr.Row():
            bars = gr.Plot(show_label=False, format="png", scale=3, elem_id="distributions")
            energies = gr.Plot(show_label=False, format="png", scale=2, elem_id="energies")
        table = gr.Dataframe(
            headers=list(TOKEN_COLUMNS),
            label="Every token and its energies, from the start to the end. Click a row.",
            interactive=False,
            max_height=320,
            elem_id="table",
        )
        gr.Markdown(about_model(self.model, self.source))

        inputs = [prompt, steps, candidates, noise, scale, new, temperature, seed]
        outputs = [state, shown, chips, table, number, line, bars, energies]
        button.click(self.generate, inputs, outputs, **ONE_AT_A_TIME)
        stop.click(self.stop, None, None, queue=False, **PRIVATE)
        # a click on a token or a row moves the slider, and the slider shows the token
        for picked in (chips, table):
            picked.select(_picked, None, number, **PRIVATE)
        number.change(self.show, [state, number], [line, bars, energies], trigger_mode="always_last", **ONE_AT_A_TIME)

    @property
    def _most_new(self) -> int:
        return min(MOST_NEW_TOKENS, room_for(self.model, 1))


def _picked(event: gr.SelectData) -> int:
    """The number, from 1, of the token or the row that was clicked."""
    # a row says its number itself: the visitor may have sorted the table
    return int(event.row_value[0]) if isinstance(event.index, (list, tuple)) else 1 + event.index


__all__ = ["TOKEN_COLUMNS", "TextTab", "about_token", "token_rows"]
