"""Local updates under Trainer: a mixin for any subclass of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from ..groups import parameter_groups
from ..local import LocalUpdates, LoRDO
from ..options import OptionError

# The mixin is used beside a subclass of Trainer. The type checker takes it for a Trainer.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


class LocalUpdateTrainerMixin(_Base):
    """Trainer's processes train alone, and average their models at intervals: `class T(LocalUpdateTrainerMixin, Trainer): ...`

    The processes also synchronise before an evaluation, before a checkpoint and at the end of training. Checkpoints have the
    state of each worker (`LocalUpdates.save`). A loss is a mean over a process's own tokens: `average_tokens_across_devices` is
    off.

    Args:
        local_updates: options of `LocalUpdates`, such as `sync_every`, except `min_workers`; and `lordo`, a mapping of LoRDO's
            options. With `lordo`, the optimizer is LoRDO with preset="measured", unless there is an optimizer already.

    Raises:
        OptionError: an unknown option or a bad value, before training starts.
    """

    def __init__(self, *given: Any, local_updates: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        options = dict(local_updates or {})
        if options.get("min_workers") is not None:
            raise OptionError("min_workers: Trainer needs every process to log and to save; use min_workers in your own loop")
        lordo = options.pop("lordo", None)
        self._lordo: dict[str, Any] | None = None if lordo is None else {"preset": "measured", **lordo}
        LocalUpdates.check(options)
        if self._lordo is not None:
            LoRDO([torch.nn.Parameter(torch.zeros(1))], lr=0.0, **self._lordo)  # raises for a bad option
        self.local_options = options
        self.local: LocalUpdates | None = None
        self._local_folder: str | None = None
        super().__init__(*given, **kwargs)
        if getattr(self.args, "average_tokens_across_devices", False):
            self.args.average_tokens_across_devices = False
        self.add_callback(_Synchronizer(self))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """See Trainer."""
        if self.optimizer is None and self._lordo is not None:
            trained: Any = self.model if model is None else model
            decaying = self.get_decay_parameter_names(trained)
            groups = parameter_groups(trained, self.args.weight_decay, decay_names=decaying)
            self.optimizer = LoRDO(groups, lr=self.args.learning_rate, **self._lordo)
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def evaluate(self, *given: Any, **kwargs: Any) -> dict[str, float]:
        """See Trainer. The workers' mean is evaluated."""
        self._synchronize()
        return super().evaluate(*given, **kwargs)

    def _save_checkpoint(self, *given: Any, **kwargs: Any) -> None:
        self._synchronize()
        super()._save_checkpoint(*given, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.local is not None:
            self.local.save(output_dir)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._local_folder = checkpoint

    def _synchronize(self) -> None:
        if self.local is not None:
            self.local.synchronize()

    def _begin(self) -> None:
        """Start, after Accelerate has prepared everything and a checkpoint, if any, is loaded."""
        if self.local is not None:  # an earlier train() was interrupted
            self.local.detach()
        self.local = LocalUpdates(self.accelerator, self.model_wrapped, self.optimizer, **self.local_options)
        if self._local_folder is not None:
            self.local.load(self._local_folder)
            self._local_folder = None

    def _end(self) -> None:
        if self.local is not None:
            if not self.args.load_best_model_at_end:  # else the best model has been loaded already
                self.local.synchronize()
            logger.info("local updates: %d synchronisations, %d bytes sent", self.local.rounds, self.local.bytes_sent)
            self.local.detach()


class _Synchronizer(TrainerCallback):
    """Tells the trainer where training begins, stops and ends."""

    def __init__(self, trainer: LocalUpdateTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self._trainer._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        if control.should_training_stop:
            self._trainer._synchronize()

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self._trainer._end()
