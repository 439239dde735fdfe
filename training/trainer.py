"""`EBTTrainer`: the Hugging Face Trainer for models that think by descending an energy."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from ..modeling_ebt.losses import perplexity
from .adapters import check_adapters
from .ema import EMACallback
from .model_card import RunFacts, is_image_model, write_model_card
from .quality import image_psnr
from .replay_trainer import ReplayTrainer, check_replay


# the parameter of the step size; beside an adapter its trained copy, not the original kept for when it is switched off
STEP_SIZE_NAME = re.compile(r"(?:^|\.)step_size\.(?:modules_to_save\.[^.]+\.)?value$")
STEP_SIZE_LR_PER_STEP_SIZE = 3.0  # the paper's rule, p. 42
TRAINER_STATE = "trainer_state.json"
WEIGHT_FILES = ("*.safetensors", "*.bin")
OBJECTIVES = {"s1": "all", "s2": "last", "proposal": "all"}  # what a recipe scores: the config's `loss_on_steps`
# outputs that are no predictions; configs of EBT models list them too, wrapped ones may not have a config
NO_PREDICTIONS = ["past_key_values", "energies", "steps_taken", "step_losses", "proposal_loss", "mean_energies"]


def find_last_checkpoint(folder: str | Path) -> Path | None:
    """
    The newest complete checkpoint in a training folder. A checkpoint is complete when its weights are there and its
    `trainer_state.json`, which is written last, can be read; what an interrupted save left behind is passed over.

    Args:
        folder (`str` or `Path`): the `output_dir` of a run; need not exist.

    Returns:
        `Path` of the checkpoint, or `None` if there is none.
    """
    root = Path(folder)
    if not root.is_dir():
        return None
    numbered = []
    for path in root.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdigit() and path.is_dir():
            numbered.append((int(number), path))
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
            return path
    return None


class _RunningMeans:
    """Token-weighted sums of named numbers, kept on the device until somebody asks for their means."""

    def __init__(self) -> None:
        self.weighted: dict[str, torch.Tensor] = {}
        self.weight: torch.Tensor | None = None

    def add(self, values: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        for name, value in values.items():
            # a share without tokens has no mean (0/0) and must not spoil the others
            contribution = torch.where(weight > 0, value.to(weight.dtype) * weight, torch.zeros_like(weight))
            self.weighted[name] = self.weighted.get(name, torch.zeros_like(weight)) + contribution
        self.weight = weight if self.weight is None else self.weight + weight

    def take(self, trainer: Trainer) -> dict[str, float]:
        """The means over all processes; empties the sums. Every process has to call it."""
        if self.weight is None:
            return {}
        names = list(self.weighted)
        sums = torch.stack([self.weight, *(self.weighted[name] for name in names)])
        self.weighted, self.weight = {}, None
        weight, *totals = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        return {name: total / weight for name, total in zip(names, totals, strict=True)} if weight > 0 else {}


class EBTTrainer(ReplayTrainer):
    r"""
    `transformers.Trainer` for Energy-Based Transformers. It takes the same arguments, trains any other model as the
    parent does, and adds:

    - **the step size** as a parameter group of its own: learning rate `step_size_lr_multiplier` times the base rate,
      no weight decay. Norms, biases and other vectors are not decayed, all matrices (embeddings too) are.
    - **the replay buffer** of recipe s2 (`replay_buffer_size`), one in each process, saved with the checkpoints. The
      rows it adds to a batch count in the loss and in the logs.
    - **metrics** in every training log, averaged over all tokens (or images) since the last one, over accumulation and
      processes: `initial_loss` and `final_loss` (after the first and the last thinking step; `proposal_loss` before
      the first, for models that start at a proposal), `energy_gap` (mean
      energy before the first step minus before the last; positive when thinking lowers the energy) and `step_size`.
    - **evaluation** whose `eval_loss` is the mean over tokens, whatever the batches and processes, and
      `eval_perplexity`, its exponential. In evaluation the loss is that of the final prediction, so it compares with
      any other language model. For models of images it is the mean over images, with `eval_psnr` (dB, on pixels
      clamped to 0..255, mean over images; not for latents).
    - **checkpoints that survive**: weights are written beside the old ones and then put in their place; a checkpoint
      that cannot be written (full disk) is removed and the one before stays the last.
    - **a model card** (`README.md`) whenever `save_model()` is called.
    - **energies for `compute_metrics`**, where `ignore_keys` leaves them in: see [`energy_compute_metrics`].
    - **adapters**: a `PeftModel` trains and is saved as with the parent, and all of the above holds for it; the step
      size learns beside the adapter with `modules_to_save=["step_size"]`.

    Args:
        *args, **kwargs: as for `transformers.Trainer`. `args` is an [`EBTTrainingArguments`], or plain
            `TrainingArguments` for their defaults.
        run_facts ([`RunFacts`], *optional*): what the model card should say that the trainer cannot know.

    Raises:
        ValueError: if the model cannot follow the recipe or its config contradicts it, `label_smoothing_factor` is
            used with an energy-based model, `step_size_lr_multiplier` is given and the model learns no step size, or
            an adapter changes one of the two uses of a table that tokens and candidates share.

    Example:

    ```python
    >>> from ebt_transformers import EBTTrainer, EBTTrainingArguments

    >>> trainer = EBTTrainer(model, EBTTrainingArguments("runs/first", max_steps=100), train_dataset=blocks)
    >>> trainer.train(resume_from_checkpoint="auto")
    ```
    """

    def __init__(self, *args: Any, run_facts: RunFacts | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_facts = run_facts or RunFacts()
        self._training_means = _RunningMeans()
        self._evaluation_means = _RunningMeans()
        self._scored_rows: int | None = None
        patience = getattr(self.args, "early_stopping_patience", None)
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience, getattr(self.args, "early_stopping_threshold", 0.0)))
        self._check_model()

    # ---- what is trained -------------------------------------------------------------------------------------

    def _check_model(self) -> None:
        objective = getattr(getattr(self.model, "config", None), "loss_on_steps", None)
        self._check_recipe(objective)
        if objective is not None and self.args.label_smoothing_factor != 0:
            raise ValueError(
                f"`label_smoothing_factor={self.args.label_smoothing_factor}` would replace the loss over all "
                "thinking steps by one over the last logits. Leave it at 0."
            )
        multiplier = getattr(self.args, "step_size_lr_multiplier", None)
        if multiplier is not None and not any(p.requires_grad for p in self._step_size_parameters(self.model)):
            raise ValueError(
                f"`step_size_lr_multiplier={multiplier}` was given, but {type(self.model).__name__} learns no step "
                "size. Leave it out, or set `learn_step_size=True` in the model's config (with an adapter: "
                "`modules_to_save=['step_size']`)."
            )
        check_adapters(self.model)
        check_replay(self.model, self.args)

    def _check_recipe(self, objective: str | None) -> None:
        recipe = getattr(self.args, "recipe", "s1")
        if objective is None and recipe != "s1":
            kind = type(self.model).__name__
            raise ValueError(f"`recipe={recipe!r}` means nothing to {kind}, which does not think. Leave it out.")
        wanted = OBJECTIVES.get(recipe, objective)
        if objective is not None and objective != wanted:
            scored = "every thinking step" if wanted == "all" else "the last thinking step"
            raise ValueError(
                f"Recipe {recipe} scores {scored}, but the model's config has `loss_on_steps={objective!r}`. Set it "
                f"to {wanted!r}."
            )
        if recipe == "proposal" and not self.model.config.starts_at_prediction:
            raise ValueError(
                f"Recipe {recipe} needs a model whose candidates start at a proposal, but its config has "
                f"`candidate_init={self.model.config.candidate_init!r}`. Make it with "
                "`EBTConfig.from_preset(..., recipe='proposal')`."
            )

    @staticmethod
    def _step_size_parameters(model: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if STEP_SIZE_NAME.search(name)]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay: matrices, which the parent's rule alone would not guarantee."""
        shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
        return [name for name in super().get_decay_parameter_names(model) if shapes.get(name, 2) >= 2]

    def step_size_learning_rate(self) -> float:
        """The base learning rate of the step-size group: multiplier (default 3 x the config's step size) x base."""
        multiplier = getattr(self.args, "step_size_lr_multiplier", None)
        if multiplier is None:
            config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
            multiplier = STEP_SIZE_LR_PER_STEP_SIZE * float(getattr(config, "step_size", 1.0 / 3.0))
        return multiplier * self.args.learning_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        The optimiser of the arguments with three groups: decayed matrices, undecayed vectors, and the step size. An
        optimiser passed to the trainer is left as it is.

        Args:
            model (`nn.Module`, *optional*): the model whose parameters to take, if not the trainer's own.

        Returns:
            `torch.optim.Optimizer`
        """
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        step_sizes = [p for p in self._step_size_parameters(self.model if model is None else model) if p.requires_grad]
        if not step_sizes:
            return optimizer
        wanted = {id(parameter) for parameter in step_sizes}
        found = 0
        for group in optimizer.param_groups:
            kept = [parameter for parameter in group["params"] if id(parameter) not in wanted]
            found += len(group["params"]) - len(kept)
            group["params"] = kept
        if found != len(step_sizes):
            raise ValueError(
                f"The optimiser {self.args.optim} regroups parameters itself, so the step size cannot have a learning "
                "rate of its own. Use an adamw optimiser, or `learn_step_size=False`."
            )
        # every scheduler here scales each group by its own initial rate, so the ratio to the others stays
        optimizer.add_param_group({"params": step_sizes, "lr": self.step_size_learning_rate(), "weight_decay": 0.0})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Train, as in the parent.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint folder; `"auto"` continues from the newest complete checkpoint in `output_dir`, or starts
                afresh without one; `True` does the same but raises without one. `None` takes
                `args.resume_from_checkpoint`.

        Raises:
            ValueError: if there is nothing to resume from, or the folder is no complete checkpoint.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        source: str | None = None
        if wanted == "auto" or wanted is True:
            last = find_last_checkpoint(self.args.output_dir)
            if last is None and wanted is True:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir}. Train without resuming.")
            source = None if last is None else str(last)
        elif wanted:
            source = str(wanted)
            if not (Path(source) / TRAINER_STATE).is_file():
                raise ValueError(
                    f"{source} is no complete checkpoint: it has no {TRAINER_STATE}. Give a checkpoint-N folder of a "
                    "run, or 'auto' for the newest complete one in the output folder."
                )
        for callback in self._averages():
            callback.restore_from = None if source is None else Path(source)
        return super().train(source, *args, **kwargs)

    def _averages(self) -> list[EMACallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EMACallback)]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has the moving average of its weights inside, if there is one."""
        averages = self._averages()
        if not averages:
            yield
            return
        with averages[0].applied(self.accelerator.unwrap_model(self.model)):
            yield

    # ---- loss and metrics ------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        The model's loss, as in the parent: its sum over tokens (or pixels) divided by `num_items_in_batch`, so
        that accumulated and distributed batches count as one. Notes what the logs need on the way.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        counted = self._count(inputs, loss.device)
        if counted is not None:
            items, weight = counted
            # what turns a loss of the model, a sum over this batch divided by all items, into this batch's mean
            to_mean = torch.ones_like(items)
            if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
                everything = torch.as_tensor(num_items_in_batch, device=items.device).flatten()[0]
                to_mean = everything.to(items.dtype) / items.clamp(min=1)
            if model.training:
                self._note_training(outputs, weight, to_mean)
            else:
                scaled = self.args.average_tokens_across_devices and num_items_in_batch is not None
                processes = self.accelerator.num_processes if scaled and self.model_accepts_loss_kwargs else 1
                means = {"loss": loss.detach().mean() / processes * to_mean}
                quality = self._image_quality(outputs, inputs["labels"])
                self._evaluation_means.add(means if quality is None else {**means, "psnr": quality}, weight)
        return (loss, outputs) if return_outputs else loss

    def _count(self, inputs: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the model's loss sums over, and how much this batch weighs: tokens, or pixels and images."""
        labels, targets = inputs.get("labels"), inputs.get("shift_labels")
        if labels is None:
            return None
        exact = torch.float32 if device.type == "mps" else torch.float64
        if self._predicts_tokens():
            # position 0 is never predicted: the model shifts the labels
            tokens = (labels[..., 1:] if targets is None else targets).ne(-100).sum().to(device, exact)
            return tokens, tokens
        if self._predicts_images(inputs):
            rows = len(labels) if self._scored_rows is None else self._scored_rows
            return torch.tensor(labels.numel(), device=device).to(exact), torch.tensor(rows, device=device).to(exact)
        return None

    def _image_quality(self, outputs: Any, clean: torch.Tensor) -> torch.Tensor | None:
        """Mean PSNR of denoised images; None for anything else (latents are no pixels)."""
        reconstruction = outputs.get("reconstruction") if isinstance(outputs, Mapping) else None
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if reconstruction is None or getattr(config, "vae_name_or_path", None) is not None:
            return None
        return image_psnr(reconstruction, clean).mean()

    def _predicts_images(self, inputs: dict[str, Any]) -> bool:
        pixels, labels = inputs.get("pixel_values"), inputs.get("labels")
        known = pixels is not None and labels is not None and pixels.shape == labels.shape
        return known and is_image_model(self.accelerator.unwrap_model(self.model))

    def _predicts_tokens(self) -> bool:
        return getattr(self.accelerator.unwrap_model(self.model), "loss_type", None) == "ForCausalLM"

    def _note_training(self, outputs: Any, weight: torch.Tensor, to_mean: torch.Tensor) -> None:
        values: dict[str, torch.Tensor] = {}
        get = outputs.get if isinstance(outputs, Mapping) else lambda name: getattr(outputs, name, None)
        losses, energies, proposal = get("step_losses"), get("mean_energies"), get("proposal_loss")
        if proposal is not None:
            values["proposal_loss"] = proposal * to_mean
        if losses is not None:
            values["initial_loss"], values["final_loss"] = losses[0].detach() * to_mean, losses[-1].detach() * to_mean
        if energies is not None:
            values["energy_gap"] = (energies[0] - energies[-1]).detach()
        if values:
            self._training_means.add(values, weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as in the parent; training logs also get the thinking metrics."""
        if "loss" in logs:
            logs.update(self._training_means.take(self))
            step_sizes = self._step_size_parameters(self.accelerator.unwrap_model(self.model))
            if step_sizes:
                value = step_sizes[0].detach()
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                if value.numel():
                    logs["step_size"] = value.float().mean().item()
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """
        One evaluation batch, as in the parent; rows that only fill the last batch up are not scored. Energies are
        among the predictions if `ignore_keys` is given without them (see `compute_metrics.py`).
        """
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = [*getattr(config, "keys_to_ignore_at_inference", []), *NO_PREDICTIONS]
        elif "energies" not in ignore_keys and not prediction_loss_only and hasattr(self.model, "energy"):
            inputs = {**inputs, "output_energies": True}
        self._scored_rows = None
        if self._predicts_images(inputs):
            inputs = self._score_images_once(inputs, prediction_loss_only)
        else:
            inputs = self._score_rows_once(inputs)
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._scored_rows = None

    def _own_rows(self, count: int) -> int:
        """How many of this batch's rows do not repeat others only to make batches of several processes even."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return count
        return min(max(state.remainder - self.accelerator.process_index * count, 0), count)

    def _score_images_once(self, inputs: dict[str, Any], loss_only: bool) -> dict[str, Any]:
        """Of images that repeat others one at most is looked at, and none counted (unless predictions are wanted)."""
        labels = inputs.get("labels")
        if labels is None:
            return inputs
        own = self._scored_rows = self._own_rows(len(labels))
        if own == len(labels) or not loss_only:
            return inputs
        count = len(labels)
        return {
            name: value[: max(own, 1)] if isinstance(value, torch.Tensor) and len(value) == count else value
            for name, value in inputs.items()
        }

    def _score_rows_once(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Several processes need batches of one size, so the last ones repeat rows; those get no labels."""
        labels = inputs.get("labels")
        if labels is None or not self._predicts_tokens():
            return inputs
        own = self._own_rows(len(labels))
        if own == len(labels):
            return inputs
        labels = labels.clone()
        labels[own:] = -100
        return {**inputs, "labels": labels}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The parent's loop; the loss becomes the exact mean over tokens or images, with perplexity or PSNR."""
        self._evaluation_means = _RunningMeans()
        with self._averaged():
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._evaluation_means.take(self)
        if "loss" in means:
            output.metrics[f"{prefix}_loss"] = means["loss"]
            if self._predicts_tokens():
                output.metrics[f"{prefix}_perplexity"] = perplexity(means["loss"])
        if "psnr" in means:
            output.metrics[f"{prefix}_psnr"] = means["psnr"]
        return output

    # ---- saving ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            last = find_last_checkpoint(folder.parent)
            kept = f"The last good checkpoint is {last}." if last else "There is no earlier checkpoint."
            raise OSError(
                f"Could not save checkpoint {folder} ({error}). {kept} Free some space and start the same command "
                "again to resume."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the parent pushes config and weights of the newest checkpoint, but not the code that the config names
        if self.is_world_process_zero():
            for code in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(code, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        target = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.args.should_save:
            super()._save(str(target), state_dict)
            return
        target.mkdir(parents=True, exist_ok=True)
        # written beside and moved: a save that fails half-way leaves the files of the last one as they were
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as scratch:
            super()._save(scratch, state_dict)
            (Path(scratch) / "README.md").unlink(missing_ok=True)  # peft's, which knows nothing of the run
            new = sorted(Path(scratch).iterdir())
            names = {path.name for path in new}
            for path in new:
                place = target / path.name
                if place.is_dir():
                    shutil.rmtree(place)
                path.replace(place)
        for stale in target.glob("model*.safetensors*"):
            if stale.name not in names and any(name.startswith("model") for name in names):
                stale.unlink()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model, its generation config and the tokenizer so that `from_pretrained()` finds them, and write the
        model card beside them (checkpoints on the way get none).

        Args:
            output_dir (`str`, *optional*): folder to save to, defaults to `args.output_dir`.
        """
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and self.args.should_save:
            for callback in self._averages():
                callback.save(self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir)
        folder = self.args.output_dir if output_dir is None else output_dir
        has_card = self.args.push_to_hub and Path(folder) == Path(self.args.output_dir)  # the parent has pushed it
        if not _internal_call and not has_card and self.is_world_process_zero():
            write_model_card(self, folder)

    def create_model_card(self, **card_data: Any) -> None:
        """
        Write `README.md` to `args.output_dir`: recipe, data, command, seed, losses, perplexity and versions.

        Args:
            card_data: what the parent takes (`language`, `license`, `tags`, `model_name`, `finetuned_from`, `tasks`,
                `dataset_tags`, `dataset`, `dataset_args`); wins over what the trainer would write.
        """
        if self.is_world_process_zero():
            write_model_card(self, self.args.output_dir, **card_data)


__all__ = ["EBTTrainer", "find_last_checkpoint"]
