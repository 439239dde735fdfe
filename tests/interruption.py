"""Ends a training run in the middle, for tests of what goes on from there."""

from transformers import TrainerCallback


class StopAt(TrainerCallback):
    """Stops a run after so many steps, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        """Asks the trainer to stop."""
        control.should_training_stop = state.global_step >= self.step
        return control
