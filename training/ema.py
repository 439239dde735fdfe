"""An exponential moving average of the weights: evaluated and saved instead of the trained ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """
    Keeps a moving average of the weights (diffusers' `EMAModel`). With an [`EBTTrainer`] evaluations see the average,
    it is saved and restored with the checkpoints, and when training ends the model gets it (that of the best
    checkpoint, with `load_best_model_at_end`). Checkpoints hold both: the trained weights as `model.safetensors`, to
    go on from.

    Args:
        decay (`float`, *optional*, defaults to 0.9999): of the average, between 0 and 1; smaller in the beginning,
            `(1 + step) / (10 + step)`.

    Raises:
        ValueError: for a decay out of range.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"`ema_decay` must be between 0 and 1, got {decay}.")
        self.decay = decay
        self.average: EMAModel | None = None
        self.restore_from: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the average at the model's weights, or where the checkpoint left it."""
        from diffusers.training_utils import EMAModel

        model: nn.Module = kwargs["model"]
        self.average = EMAModel(model.parameters(), decay=self.decay, foreach=True)
        if self.restore_from is not None:
            self.load(model, self.restore_from)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step of the average."""
        if self.average is not None:
            self.average.step(kwargs["model"].parameters())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the model the average."""
        model: nn.Module = kwargs["model"]
        if self.average is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(model, state.best_model_checkpoint)
        self.average.copy_to(model.parameters())
        self.average = None  # from here on the model is the average

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside."""
        if self.average is None:
            yield
            return
        parameters = list(model.parameters())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def save(self, model: nn.Module, folder: str | Path) -> None:
        """Writes the average beside a checkpoint's weights."""
        if self.average is None:
            return
        from safetensors.torch import save_file

        names = [name for name, _ in model.named_parameters()]
        tensors = dict(zip(names, self.average.shadow_params, strict=True))
        facts = {"step": str(self.average.optimization_step), "decay": str(self.decay)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder) / EMA_FILE, facts)

    def load(self, model: nn.Module, folder: str | Path, into_model: bool = False) -> None:
        """
        Reads the average of a checkpoint.

        Args:
            model (`nn.Module`): whose average it is.
            folder (`str` or `Path`): the checkpoint.
            into_model (`bool`, *optional*, defaults to `False`): give it to the model at once.

        Raises:
            ValueError: if the checkpoint has none.
        """
        from safetensors import safe_open

        path = Path(folder) / EMA_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no average of the weights ({EMA_FILE}): it was trained without one. Leave "
                "`ema_decay` out, or start afresh."
            )
        with safe_open(path, framework="pt") as file:
            shadows = [file.get_tensor(name).to(value.device) for name, value in model.named_parameters()]
            step = int(file.metadata()["step"])
        if self.average is not None:
            self.average.shadow_params = shadows
            self.average.optimization_step = step
        if into_model:
            with torch.no_grad():
                for parameter, shadow in zip(model.parameters(), shadows, strict=True):
                    parameter.copy_(shadow)


__all__ = ["EMA_FILE", "EMACallback"]
