"""How the models of benchmarks/completion.py are made, trained, asked and timed. Not a script.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels, ``N`` patches.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import synchronize
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForImageCompletion
from ebt_transformers.modeling_et.completion_et import draw_masks
from ebt_transformers.training.mae_twin import complete_images, mae_twin, noise_of
from ebt_transformers.training.trainer import EBTTrainer


BATCH = 50  # images completed at once
WARM_UP = 0.1  # share of the updates
TIMED_UPDATES = 30  # in every turn of timing
# of the paper, for both models (§2 of its appendix as the authors' code has it)
OPTIMIZER = {"adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.05, "max_grad_norm": 1.0}
OPTIMIZER |= {"lr_scheduler_type": "cosine"}


@dataclass(frozen=True)
class Recipe:
    """
    What to train.

    Args:
        model (`str`): `"et"` or `"mae"`.
        learning_rate (`float`): at its highest.
        fields (`dict`): of the config where it differs from that of all; of a twin its depth.
        positions (`str`): how position embeddings start: `"sine"`, as those of the twin, which stay like that, or
            `"random"`, as the package leaves them.
    """

    model: str
    learning_rate: float
    fields: dict[str, Any] = field(default_factory=dict)
    positions: str = "sine"

    def make(self, config: EnergyTransformerConfig, seed: int) -> nn.Module:
        """
        The new model.

        Args:
            config ([`EnergyTransformerConfig`]): of all Energy Transformers; a twin has as many parameters.
            seed (`int`): of the weights.
        """
        torch.manual_seed(seed)
        if self.model == "mae":
            return mae_twin(config, **self.fields)
        start = "sincos" if self.positions == "sine" else "normal"
        return EnergyTransformerForImageCompletion(config_with(config, position_init=start, **self.fields))


@dataclass(frozen=True)
class Plan:
    """
    What to train at full length.

    Args:
        name (`str`): of the runs.
        recipe ([`Recipe`]): what it is.
        updates (`int`): how long.
        seeds (sequence of `int`): a run for each.
    """

    name: str
    recipe: Recipe
    updates: int
    seeds: Sequence[int]


def config_with(config: EnergyTransformerConfig, **fields: Any) -> EnergyTransformerConfig:
    """A config with other fields; where its size changes, what follows from that is worked out again."""
    resized = {"hidden_size", "num_attention_heads"} & fields.keys()
    derived = ("head_dim", "num_memories", "attention_beta", "hopfield_beta", "readout_size") if resized else ()
    values = {name: value for name, value in config.to_diff_dict().items() if name not in derived}
    return EnergyTransformerConfig(**{**values, **fields})


class _Order(torch.utils.data.Dataset):
    """The images in the order in which a run sees them: drawn anew from all of them for every place."""

    def __init__(self, pixels: Tensor, count: int, seed: int) -> None:
        self.pixels = pixels
        self.numbers = torch.randint(len(pixels), (count,), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Tensor:
        return self.pixels[self.numbers[place]]


class Masking:
    """
    Makes batches of images; masks are drawn batch by batch, the same ones for every model.

    Args:
        config ([`EnergyTransformerConfig`]): how many patches are masked, and how many of those that count are not.
        model (`str`): whose inputs to make, `"et"` or `"mae"`.
        seed (`int`): of the masks.
    """

    def __init__(self, config: EnergyTransformerConfig, model: str, seed: int) -> None:
        self.config, self.model = config, model
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: list[Tensor]) -> dict[str, Tensor]:
        """
        Args:
            images (`list` of `torch.ByteTensor` of shape `(C, H, W)`): the images of a batch.
        """
        pixels = scaled(torch.stack(images))
        masked, counted = draw_masks(self.config, len(images), self.generator)
        if self.model == "mae":  # knows no visible patches that count
            return {"pixel_values": pixels, "noise": noise_of(counted)}
        return {"pixel_values": pixels, "bool_masked_pos": masked, "scored_pos": counted}


def scaled(pixels: Tensor) -> Tensor:
    """Bytes as numbers in -1..1."""
    return pixels.float() / 127.5 - 1


def clock(device: str) -> float:
    """Seconds: of the processor's work where that is the device, as other programs share it; else on the wall."""
    if device == "cpu":
        return time.process_time()
    synchronize(device)
    return time.perf_counter()


def make_trainer(
    recipe: Recipe,
    model: nn.Module,
    pixels: Tensor,
    updates: int,
    batch_size: int,
    seed: int,
    folder: Path,
    device: str = "cpu",
) -> EBTTrainer:
    """
    A trainer for a model, of any kind: the same images and masks in the same order.

    Args:
        recipe ([`Recipe`]): the learning rate.
        model (`nn.Module`): of the recipe.
        pixels (`torch.ByteTensor` of shape `(B, C, H, W)`): to learn from.
        updates, batch_size (`int`): how long, and how many images each.
        seed (`int`): of images and masks.
        folder (`Path`): the trainer's.
        device (`str`, *optional*, defaults to `"cpu"`): where; another than that is the one that the Trainer picks.
    """
    masks = model.config if recipe.model == "et" else mask_config(model.config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=updates,
        per_device_train_batch_size=batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=round(WARM_UP * updates),
        seed=seed,
        train_sampling_strategy="sequential",  # the data set has its own order
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device == "cpu",
        save_strategy="no",
        logging_steps=max(1, updates // 20),
        report_to="none",
        disable_tqdm=True,
        **OPTIMIZER,
    )
    return EBTTrainer(
        model=model,
        args=arguments,
        train_dataset=_Order(pixels, updates * batch_size, seed),
        data_collator=Masking(masks, recipe.model, seed),
    )


def mask_config(config: Any) -> EnergyTransformerConfig:
    """The config from which masks for a twin are drawn."""
    patches = (config.image_size // config.patch_size) ** 2
    masked = patches - int(patches * (1 - config.mask_ratio))
    return EnergyTransformerConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        mask_ratio=masked / patches,
        visible_ratio=0.0,
    )


@torch.no_grad()
def complete(model: nn.Module, images: Tensor, mask: Tensor, **thinking: Any) -> Tensor:
    """
    Images as a model completes them.

    Args:
        model (`nn.Module`): an Energy Transformer or its twin.
        images (`torch.FloatTensor` of shape `(B, C, H, W)`): whole, -1..1.
        mask (`torch.BoolTensor` of shape `(B, N)`): the patches it does not see.
        thinking: options of an Energy Transformer, such as `thinking_steps`.

    Returns:
        `torch.FloatTensor` of shape `(B, C, H, W)`, on the CPU.
    """
    device, found = next(model.parameters()).device, []
    for some, hidden in zip(images.split(BATCH), mask.split(BATCH), strict=True):
        some, hidden = some.to(device), hidden.to(device)
        if isinstance(model, EnergyTransformerForImageCompletion):
            found.append(model(some, bool_masked_pos=hidden, **thinking).reconstruction.cpu())
        else:
            found.append(complete_images(model, some, hidden).cpu())  # type: ignore[arg-type]
    return torch.cat(found)


class _Watch(TrainerCallback):
    """Looks at the clock after every update: what a trainer does once is not in between."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.times.append(clock(self.device))


def seconds_per_update(
    recipe: Recipe, config: EnergyTransformerConfig, pixels: Tensor, batch_size: int, folder: Path, device: str
) -> Callable[[], list[float]]:
    """
    Work for [`alternate`]: some updates of a new model.

    Args:
        recipe ([`Recipe`]), config ([`EnergyTransformerConfig`]): which model.
        pixels, batch_size, folder: as in [`make_trainer`].
        device (`str`): where.
    """
    model = recipe.make(config, 0)

    def work() -> list[float]:
        watch = _Watch(device)
        trainer = make_trainer(recipe, model, pixels, 1 + TIMED_UPDATES, batch_size, 0, folder, device)
        trainer.add_callback(watch)
        trainer.train()
        return [(watch.times[-1] - watch.times[0]) / TIMED_UPDATES]

    return work


__all__ = [
    "Masking",
    "Plan",
    "Recipe",
    "clock",
    "complete",
    "config_with",
    "make_trainer",
    "mask_config",
    "scaled",
    "seconds_per_update",
]
