"""What the tabs of the web demonstration share: how errors are shown, threads, and what they say about models."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from transformers import PreTrainedModel

from ..demo import one_thread
from ..reporting import of_steps


try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The web demonstration needs gradio: pip install "ebt-transformers[web]".') from error

MOST_STEPS = 16
SMALL = 20_000_000  # parameters; smaller models are slower with several threads
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, **PRIVATE}

ABOUT = """
### What is an Energy-Based Transformer?

1. A transformer gives an **energy** to every pair of a context and a *candidate* for what comes next: low where they
   fit.
2. A prediction is found by **walking downhill** on that energy, from a start that knows nothing. Every step of the
   walk is a *thinking step*.
3. For text the candidate is a distribution over the vocabulary; for pictures it is the picture itself.
4. You choose **how long to think**, for every call; or how many candidates think side by side, of which the one of
   lowest energy is kept.
5. The energy at the end says how well the prediction fits, so a model can judge itself, and stop by itself.

### What it costs

A thinking step is a forward and a backward pass of one token (of a picture: of all its patches) through the
transformer. Two steps cost about four times a token of an ordinary transformer with its cache; time grows with steps
and candidates.

### Its limits

- The embedded models are demonstrations of about a million parameters, trained on Tiny Shakespeare and on CIFAR-10.
- For text of this small scale one step is nearly all: more steps hardly change the prediction, and do not improve it.
- For pictures thinking longer helps where the noise is stronger than in training. With weaker noise more steps blur.
- Energies on different landscapes cannot be compared: a dotted line shows where the landscape changes. On the last
  one a step may go uphill, too, where its trained size carries the candidate across the valley.

### More

The folder `docs/` of the repository says how to train, think, denoise and measure, and `README.md` what all of it
costs and buys; `docs/howto/web.md` is about these pages. The paper is
[arXiv 2507.02092](https://arxiv.org/abs/2507.02092).
"""


@contextmanager
def as_message() -> Iterator[None]:
    """A mistake of the user becomes a message on the page; a mistake of ours stays an error with its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def threads_for(model: PreTrainedModel) -> AbstractContextManager[None]:
    return one_thread() if model.num_parameters() < SMALL else nullcontext()


def about_model(model: PreTrainedModel, source: str | None) -> str:
    """One line: which model, how large, and how long it was trained to think."""
    config = model.config
    return (
        f"Model: **{source or 'embedded'}**, {model.num_parameters() / 1e6:.2f} M parameters, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_landscapes} energy "
        f"landscape{'s' if config.num_landscapes > 1 else ''}, trained to think "
        f"{of_steps(config.default_thinking().steps)}."
    )


__all__ = ["ABOUT", "MOST_STEPS", "ONE_AT_A_TIME", "PRIVATE", "about_model", "as_message", "gr", "threads_for"]
