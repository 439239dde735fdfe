"""The part of [`EBTTrainer`] that replays: some rows of every batch start where an earlier descent of theirs ended."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..modeling_ebt.thinking import training_start
from .card_facts import is_image_model, predicts_at_start, thinks
from .replay_buffer import REPLAYED, ReplayBuffer


logger = logging.getLogger(__name__)


def check_replay(model: nn.Module, args: TrainingArguments) -> None:
    """Raises for a model that cannot start where a descent ended: one that does not think, or thinks about images."""
    size = getattr(args, "replay_buffer_size", None) or 0
    if size and (not thinks(model) or is_image_model(model)):
        raise ValueError(
            f"`replay_buffer_size={size}` is for energy-based models of text, and {type(model).__name__} is none. Set "
            "it to 0."
        )
    if size and predicts_at_start(model):
        raise ValueError(
            f"`replay_buffer_size={size}` starts rows where an earlier descent of theirs ended, but this model starts "
            "at its own proposal (`candidate_init='proposal'`). Set it to 0."
        )


class ReplayTrainer(Trainer):
    """
    A Trainer with a [`ReplayBuffer`] while `train()` runs, if `args.replay_buffer_size` is above 0. Each process has
    one of its own. Evaluation neither reads nor fills it.
    """

    replay_buffer: ReplayBuffer | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as the parent does; a checkpoint to resume from brings its buffer."""
        self.replay_buffer = self._new_replay_buffer()
        if self.replay_buffer is not None and isinstance(resume_from_checkpoint, str):
            self._load_replay_buffer(self.replay_buffer, self._replay_file(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.replay_buffer = None  # it can be larger than everything else

    def _new_replay_buffer(self) -> ReplayBuffer | None:
        size = getattr(self.args, "replay_buffer_size", None) or 0
        if size == 0:
            return None
        return ReplayBuffer(
            size,
            self.args.replay_buffer_share,
            self.args.seed * 1_000_003 + self.args.process_index,
            self.args.replay_buffer_device or self.args.device,
            self.args.replay_buffer_memory,
        )

    # ---- what is replayed ------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | int | None]:
        """The batches of one update as in the parent, with stored rows behind; those count as its items, too."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.replay_buffer is None or not batches:
            return batches, items
        config = self.accelerator.unwrap_model(self.model).config
        self.replay_buffer.check_memory(batches, config.vocab_size)
        batches = self.replay_buffer.extend(batches)
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss as in the parent; replayed rows start where they ended, and new ones are stored."""
        if self.replay_buffer is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        replayed: list[Tensor] = inputs.get(REPLAYED, [])
        batch = {name: value for name, value in inputs.items() if name != REPLAYED}
        asked = {**batch, "initial_candidate": self._starts(batch, replayed)} if replayed else dict(batch)
        loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        states = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        self.replay_buffer.add(batch, states[: len(states) - len(replayed)])
        return (loss, outputs) if return_outputs else loss

    def _starts(self, batch: Mapping[str, Tensor], replayed: list[Tensor]) -> Tensor:
        """Where every row starts (B + R, T, V): the new ones as without a buffer, the others where they ended."""
        config = self.accelerator.unwrap_model(self.model).config
        shape = (*batch["input_ids"].shape, config.vocab_size)
        spread = float(config.candidate_init_std)
        starts = training_start(config.starts_at_random, spread, shape, batch["input_ids"].device)
        for start, state in zip(starts[-len(replayed) :], replayed, strict=True):
            start[: len(state)] = state  # positions that were filled up are not predicted
        return starts

    # ---- checkpoints -----------------------------------------------------------------------------------------

    def _replay_file(self, folder: str | Path) -> Path:
        process = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(folder) / f"replay_buffer{process}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        # every process comes here, before the file that makes a checkpoint complete is written
        super()._save_rng_state(output_dir)
        if self.replay_buffer is not None:
            self.replay_buffer.save(self._replay_file(output_dir))

    @staticmethod
    def _load_replay_buffer(buffer: ReplayBuffer, path: Path) -> None:
        if path.is_file():
            buffer.load(path)
            return
        logger.warning(
            f"{path.parent} holds no {path.name}: it was saved without a replay buffer, or by another number of "
            "processes. The buffer starts empty, so this run differs from an uninterrupted one."
        )


__all__ = ["ReplayTrainer", "check_replay"]
