"""What thinking does in one model, measured on a few validation rows: quality, energy and cost by steps."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from .card_facts import is_image_model, predicts_at_start
from .quality import image_psnr


STEPS = (1, 2, 4, 8)  # what a card compares
MOST_STEPS = 16  # a model's own number of steps is compared, too, unless it thinks longer than this
ROWS, TOKENS, PATCHES = 16, 512, 1024  # what a measurement looks at, at most
COUNTED_TOKENS = 64  # of the row whose operations are counted


@dataclass(frozen=True)
class ThinkingMeasurement:
    """
    Quality and energy after every thinking step, and cost by steps. Plain data: `dataclasses.asdict` and JSON keep it.

    Args:
        kind (`str`): `"text"`, `"pixels"` or `"latents"`.
        rows, positions (`int`): what was measured on: rows of text and predicted tokens, or images and their patches.
        default_steps (`int`): thinking steps of the model where a call says nothing.
        landscapes (`int`): energy landscapes; the first steps walk one each.
        steps (`list[int]`): the numbers of steps that a card compares, ascending.
        losses (`list[float]`): mean loss after step 1, 2, ..., K.
        energies (`list[float]`): mean energy before the first step and after step 1, 2, ..., K.
        psnr (`list[float]`, *optional*): of pixels, at the start and after step 1, 2, ..., K, in dB.
        flops (`list[float]`): for each of `steps`, the floating point operations of a prediction, in units of those of
            one forward pass.
        counted_on (`int`): tokens or patches of the row whose operations were counted.
        start_loss (`float`, *optional*): mean loss before step 1, of models that start at a prediction of their own;
            `steps` then begins with 0.
    """

    kind: str
    rows: int
    positions: int
    default_steps: int
    landscapes: int
    steps: list[int]
    losses: list[float]
    energies: list[float]
    psnr: list[float] | None
    flops: list[float]
    counted_on: int
    start_loss: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ThinkingMeasurement":
        """What `dataclasses.asdict` gave."""
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})

    @property
    def curve(self) -> tuple[int, list[float]]:
        """Losses (or PSNR) by number of steps: the first number that has one, and the values from there on."""
        if self.psnr is not None:
            return 0, self.psnr
        return (1, self.losses) if self.start_loss is None else (0, [self.start_loss, *self.losses])

    def value(self, steps: int) -> float:
        """PSNR, or loss, after so many steps."""
        first, values = self.curve
        return values[steps - first]

    def quality(self, steps: int) -> float:
        """PSNR, or the negative loss, after so many steps: more is better."""
        return self.value(steps) if self.psnr is not None else -self.value(steps)

    @property
    def best_steps(self) -> int:
        """The best of the compared numbers of steps; the smallest of equals."""
        return max(self.steps, key=lambda steps: (self.quality(steps), -steps))


def compared_steps(model: PreTrainedModel) -> list[int]:
    """The numbers of steps that the card of a model compares; 0 among them if it predicts without any."""
    return [0, *STEPS] if predicts_at_start(model) else list(STEPS)


# ---- leaving everything as it was ------------------------------------------------------------------------------


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, everything outside draws what it would have drawn without it."""
    python, numpy = random.getstate(), np.random.get_state()
    forked = device.type not in ("cpu", "mps", "meta")
    devices = [device.index or 0] if forked else []
    with torch.random.fork_rng(devices, device_type=device.type if forked else "cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode and keeps no gradients; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---- rows ------------------------------------------------------------------------------------------------------


def some_rows(dataset: Any, count: int = ROWS) -> list[Any]:
    """
    A few rows of a validation set, spread over it; the first ones of a stream.

    Args:
        dataset: what a Trainer takes as `eval_dataset`: with a length, a stream, a dict of these (its first), or None.
        count (`int`, *optional*, defaults to 16): of the rows.

    Returns:
        A list of rows, empty if there are none that can be read without taking them away from others.
    """
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()), None)
    if dataset is None:
        return []
    if not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
        size = len(dataset)
        taken = min(count, size)
        return [dataset[index * size // taken] for index in range(taken)]
    rows = iter(dataset)
    return [] if rows is dataset else list(islice(rows, count))


def bounded(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of at most 512 tokens, or images of at most 1024 patches (one image at least), on the model's device."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if is_image_model(model):
        length, limit = _patches(tensors["pixel_values"], model), PATCHES
    else:
        length, limit = tensors["input_ids"].shape[1], TOKENS
        tensors = {name: value[:, :TOKENS] for name, value in tensors.items() if value.dim() >= 2}
    rows = max(1, min(ROWS, limit // length))
    return {name: value[:rows].to(model.device) for name, value in tensors.items()}


def _patches(images: Tensor, model: PreTrainedModel) -> int:
    """Patches of one image."""
    height, width = images.shape[-2:]
    return height * width // model.config.patch_size**2


# ---- cost ------------------------------------------------------------------------------------------------------


def thinking_passes(model: PreTrainedModel, steps: int) -> tuple[int, int]:
    """
    Forward and backward passes of the transformer for one prediction with so many thinking steps: a text model reads
    its context once per landscape, and then every step is one forward and one backward pass of the candidates. With 0
    steps the context is all there is.
    """
    contexts = 0 if is_image_model(model) else max(1, min(steps, model.config.num_landscapes))
    return contexts + steps, steps


class _FlopCounter(TorchDispatchMode):
    """Adds up what PyTorch's formulas say. (Its own `FlopCounterMode` hooks modules, and fails in a descent.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


def count_flops(call: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products and convolutions in a call, backward passes inside it too."""
    # fused attention on a CPU has no formula; written out it has, and it is the same work
    with _FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.total


def relative_flops(model: PreTrainedModel, batch: Mapping[str, Tensor], steps: list[int]) -> tuple[list[float], int]:
    """
    Operations of a prediction by steps, in units of one forward pass of the same transformer (for text with an output
    layer), which is what a model of this size costs that does not think.

    Args:
        model (`nn.Module`): in evaluation mode.
        batch (`dict`): `input_ids` `(B, S)` or `pixel_values` `(B, C, H, W)`; the first row is used, 64 tokens of it.
        steps (`list[int]`): numbers of thinking steps.

    Returns:
        One number for each of `steps`, and the tokens or patches they were counted on.
    """
    if is_image_model(model):
        images = batch["pixel_values"][:1]
        # what the image is conditioned on costs the same whatever it is
        context = {"noisy_pixel_values": images} if model.config.image_conditioning == "noisy_image" else {}
        once = count_flops(partial(model.model, images.to(model.dtype), **context))
        counts = [count_flops(partial(model, images, thinking_steps=n, thinking_candidates=1)) for n in steps]
        return [count / once for count in counts], _patches(images, model)
    ids = batch["input_ids"][:1, :COUNTED_TOKENS]
    config = model.config
    output_layer = 2 * ids.shape[1] * config.hidden_size * config.vocab_size
    once = output_layer + count_flops(partial(model.model, input_ids=ids, num_landscapes=1, use_cache=False))
    options = {"use_cache": False, "thinking_candidates": 1}
    counts = [count_flops(partial(model, input_ids=ids, thinking_steps=n, **options)) for n in steps]
    return [count / once for count in counts], ids.shape[1]


# ---- quality ---------------------------------------------------------------------------------------------------


def _text_by_steps(model: PreTrainedModel, batch: dict[str, Tensor], most: int) -> dict[str, Any]:
    output = model(**batch, use_cache=False, thinking_steps=most, thinking_candidates=1, output_energies=True)
    scored = batch["labels"][:, 1:] != -100
    energies = output.energies[:, :-1][scored]  # (positions, K + 1)
    measured = {"positions": int(scored.sum()), "energies": energies.mean(0).tolist(), "psnr": None}
    if output.proposal_loss is not None:
        measured["start_loss"] = output.proposal_loss.item()
    return {"kind": "text", "losses": output.step_losses.tolist(), **measured}


def _images_by_steps(model: PreTrainedModel, batch: dict[str, Tensor], most: int) -> dict[str, Any]:
    noisy, clean = batch["pixel_values"], batch["labels"]
    asked = {"output_energies": True, "output_trajectory": True}
    output = model(noisy, labels=clean, thinking_steps=most, thinking_candidates=1, **asked)
    pixels = getattr(model.config, "vae_name_or_path", None) is None
    states = output.trajectory.unbind(1)  # the start and after every step
    return {
        "kind": "pixels" if pixels else "latents",
        "positions": len(noisy) * _patches(noisy, model),
        "losses": output.step_losses.tolist(),
        "energies": output.energies.mean(0).tolist(),
        "psnr": [image_psnr(state, clean).mean().item() for state in states] if pixels else None,
    }


def measure_thinking(model: PreTrainedModel, batch: Mapping[str, Any]) -> ThinkingMeasurement:
    """
    Measures what thinking does on a small batch, in one descent and one count of operations for each number of steps.
    The model's mode, its gradients and every random state are afterwards what they were before.

    Args:
        model ([`EBTForCausalLM`] or [`EBTForImageDenoising`]): the model itself, whole on its device.
        batch (`dict`): what the model takes, with `labels`: `input_ids` `(B, S)`, or `pixel_values` `(B, C, H, W)`.
            At most 512 tokens or 16 images of it are looked at.

    Returns:
        [`ThinkingMeasurement`].

    Raises:
        ValueError: if the batch has no labels, or they leave nothing to predict.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EBTConfig, EBTForCausalLM
    >>> from ebt_transformers.training.card_measurements import measure_thinking

    >>> model = EBTForCausalLM(EBTConfig.from_preset("4xs", vocab_size=32))
    >>> ids = torch.randint(0, 32, (2, 16))
    >>> found = measure_thinking(model, {"input_ids": ids, "labels": ids})
    >>> found.steps, len(found.losses), len(found.energies), found.positions
    ([1, 2, 4, 8], 8, 9, 30)
    ```
    """
    if batch.get("labels") is None:
        raise ValueError(f"A measurement needs rows with `labels`, got {', '.join(sorted(batch))}.")
    default = model.config.default_thinking().steps
    steps = sorted({*compared_steps(model), *([default] if default <= MOST_STEPS else [])})
    with same_random_state(model.device), evaluating(model):
        batch = bounded(batch, model)
        by_steps = (_images_by_steps if is_image_model(model) else _text_by_steps)(model, batch, steps[-1])
        if not by_steps["positions"]:
            raise ValueError("Every label of the validation rows is -100: there is nothing to predict.")
        flops, counted_on = relative_flops(model, batch, steps)
    return ThinkingMeasurement(
        rows=len(batch["labels"]),
        default_steps=default,
        landscapes=model.config.num_landscapes,
        steps=steps,
        flops=flops,
        counted_on=counted_on,
        **by_steps,
    )


__all__ = [
    "STEPS",
    "ThinkingMeasurement",
    "compared_steps",
    "count_flops",
    "evaluating",
    "measure_thinking",
    "relative_flops",
    "same_random_state",
    "some_rows",
    "thinking_passes",
]
