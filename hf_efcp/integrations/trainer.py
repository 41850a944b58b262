"""Trainer with our optimizers: EFCPTrainer, and a mixin for any other Trainer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from ..groups import check_targets
from ..registry import list_optimizers
from .arguments import EFCPTrainingArguments
from .callback import add_callbacks
from .trainer_options import is_ours, name_of, optimizer_cls_and_kwargs

# EFCPTrainerMixin is used beside a subclass of Trainer. The type checker takes it for a Trainer.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


class EFCPTrainerMixin(_Base):
    """Gives any subclass of Trainer what EFCPTrainer has: `class MyTrainer(EFCPTrainerMixin, Seq2SeqTrainer): ...`

    - Parameter groups follow the trainer's own `get_decay_parameter_names`; `optim_target_modules` is checked at once.
    - Every training log has the `diagnostics()`, see `EFCPCallback`.

    With another package's optimizer it changes nothing.
    """

    def __init__(self, *given: Any, **kwargs: Any) -> None:
        # Arguments are found by type, not by place: DPOTrainer and GRPOTrainer have another one between model and args.
        model = kwargs.get("model", given[0] if given else None)
        args = next((a for a in (*given, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        adapted_later = kwargs.get("peft_config") is not None
        if args is not None and not is_ours(args):
            logger.warning(
                "optim=%s is not one of hf_efcp's (%s): it is used as ever", name_of(args), ", ".join(list_optimizers())
            )
        elif args is not None and isinstance(model, torch.nn.Module) and not adapted_later:
            check_targets(model, args.optim_target_modules)
        super().__init__(*given, **kwargs)
        add_callbacks(self, always=True)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """See Trainer."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and is_ours(self.args):
            trained: Any = self.model if model is None else model
            names = self.get_decay_parameter_names(trained)
            cls, options = optimizer_cls_and_kwargs(self.args, model=trained, decay_names=names)
            self.optimizer = cls(options.pop("params"), **options)
        return super().create_optimizer() if model is None else super().create_optimizer(model)


class EFCPTrainer(EFCPTrainerMixin, Trainer):
    """`transformers.Trainer` with EFCPTrainerMixin.

    It takes any TrainingArguments. Without `args`, it makes EFCPTrainingArguments, which have typed options.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any) -> None:
        super().__init__(model, EFCPTrainingArguments("trainer_output") if args is None else args, *rest, **kwargs)
