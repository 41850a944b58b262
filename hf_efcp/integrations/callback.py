"""A Trainer callback that logs the optimizer's diagnostics; and the function that adds the callbacks that arguments ask for."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..options import OptionError
from .checkpoints import unwrapped
from .run_options import DIAGNOSTICS_STEPS
from .trainer_options import run_options
from .wrapped import diagnostics


class EFCPCallback(TrainerCallback):
    """Logs the optimizer's `diagnostics()` through Trainer's own logging, as `efcp_NAME`: to all reporters and the history.

    Every N-th step and the last step are probed and logged, together with the loss. Other logs of the training loss get the
    diagnostics that cost nothing. With another package's optimizer nothing changes.

    Args:
        every: N; 0: no step is probed.

    Raises:
        OptionError: `every` is no integer >= 0.
    """

    def __init__(self, every: int = DIAGNOSTICS_STEPS):
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise OptionError(f"every={every!r}: expected an integer >= 0")
        self.every = every

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Probe a step that is due, on every process."""
        if self._due(state.global_step + 1, state) and (ours := unwrapped(optimizer)) is not None:
            ours.probe_next_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Let Trainer log a step that was probed."""
        if self._due(state.global_step, state) and unwrapped(optimizer) is not None:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Extend the log of the training loss."""
        if not logs or "loss" not in logs:
            return
        found = diagnostics(optimizer)
        logs.update(found)
        # The history got its own copy of the log before the callbacks ran.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def _due(self, step: int, state: TrainerState) -> bool:
        return self.every > 0 and (step % self.every == 0 or step == state.max_steps)


def add_callbacks(trainer: Trainer, always: bool = False) -> None:
    """Give a Trainer the callbacks that its arguments ask for.

    Diagnostics come before the reporters, which see only what callbacks before them have added.

    Args:
        trainer: its arguments may have `efcp_diagnostics_steps` and `efcp_report`, as fields or in `optim_args`.
        always: whether diagnostics are logged even if nobody asks for them.
    """
    wanted, callbacks = run_options(trainer.args), trainer.callback_handler.callbacks
    own = [callback for callback in callbacks if isinstance(callback, EFCPCallback)]
    if not own and (always or wanted.diagnostics_steps is not None):
        steps = wanted.diagnostics_steps
        own = [EFCPCallback(DIAGNOSTICS_STEPS if steps is None else steps)]
    callbacks[:] = [*own, *(callback for callback in callbacks if callback not in own)]
    if wanted.report:
        from ..report.record import RunRecord

        if not any(isinstance(callback, RunRecord) for callback in callbacks):
            callbacks.append(RunRecord())
