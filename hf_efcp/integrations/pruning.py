"""A Trainer callback that prunes a model while it is trained, and keeps its zeros, even over a resume."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..options import OptionError, build
from ..pruning.masks import FILE, Masks
from ..pruning.model import prune
from ..pruning.options import PruningOptions
from ..pruning.patterns import Pattern
from ..pruning.window import refuse_unfit
from .checkpoints import unwrapped

logger = logging.getLogger(__name__)


class IOBSCallback(TrainerCallback):
    """Prunes a Trainer's model by `prune`, at once or in stages, and keeps the zeros during the steps that follow.

    The zeros stay with every optimizer. A checkpoint has the masks in `pruning_masks.pt`. A resumed run takes the masks from this
    file or, if it is missing, from the zeros of the loaded weights.

    Args:
        sparsity: the share of zeros after the last stage, see `prune`.
        pattern: see `prune`.
        start_step: the first stage comes after this many steps; 0: before the first step.
        stages: number of stages. Stage i = 1, 2, ... has the sparsity sparsity * (1 - (1 - i / stages)^3) (arXiv 1710.01878).
        stage_steps: steps from one stage to the next.
        calibration: batches, see `prune`; None: they are drawn from the training data.
        calibration_batches: the number of batches that are drawn, of the Trainer's training batch size.
        seed: of the draw.
        modules: see `prune`.
        **options: the other options of `prune`. method="mfac" takes the window of the Trainer's own optimizer, if the optimizer
            is of the M-FAC family and has entries in its window.

    Attributes:
        masks: what is pruned; None before the first stage.

    Raises:
        OptionError: a bad option; N:M or a method without a share of zeros in several stages.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        *,
        start_step: int = 0,
        stages: int = 1,
        stage_steps: int = 100,
        calibration: Iterable[Any] | None = None,
        calibration_batches: int = 16,
        seed: int = 0,
        modules: Any = None,
        **options: Any,
    ):
        limits = {"start_step": (start_step, 0), "stages": (stages, 1), "stage_steps": (stage_steps, 1)}
        limits["calibration_batches"] = calibration_batches, 1
        for name, (value, least) in limits.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{name}={value!r}: must be an integer >= {least}")
        parsed = Pattern.parse(pattern)
        if parsed.of and stages > 1:
            raise OptionError(f"stages={stages}: pattern={pattern!r} has one sparsity; use stages=1")
        self.sparsity, self.pattern, self.modules, self.seed = parsed.sparsity(sparsity), pattern, modules, seed
        self.options = build(PruningOptions, options, type(self).__name__)
        if self.options.training != "masked":
            raise OptionError(f"training={self.options.training!r}: call prune() before the Trainer is made")
        self._given = {name: value for name, value in options.items() if name != "training"}
        self._due = [start_step + i * stage_steps for i in range(stages)]
        self._calibration = None if calibration is None else list(calibration)
        self._batches = calibration_batches
        self.masks: Masks | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Prune if the first stage is before the first step; in a resumed run, take the masks.

        Raises:
            OptionError: under DeepSpeed or FSDP, where weights are not whole here.
        """
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise OptionError("IOBSCallback: DeepSpeed and FSDP divide the weights; use DDP, or prune before with prune()")
        if any(step <= state.global_step for step in self._due) and state.global_step > 0:
            self.masks = self._saved(args, state, model).hold()
        elif self._due[0] == 0:
            self._prune(args, 0, model, kwargs)
        if self.options.method == "mfac" and (ours := _mfac(kwargs.get("optimizer"))) is not None:
            refuse_unfit(ours)  # refuse now, not only at the stage

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Undo what the optimizer did to pruned weights."""
        if self.masks is not None:
            self.masks.apply()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Prune if a stage is due."""
        if state.global_step > 0 and state.global_step in self._due:
            self._prune(args, self._due.index(state.global_step), model, kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the masks beside the weights."""
        if self.masks is not None and state.is_world_process_zero:
            self.masks.save(_checkpoint(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Release the weights. They have their zeros, unless Trainer has loaded an earlier checkpoint as the best one."""
        if self.masks is not None:
            if not self.masks.are_zero():
                logger.warning(
                    "load_best_model_at_end has loaded a checkpoint from before the last stage: pruned weights are not zero. "
                    "Take a checkpoint from after step %d, or prune() the model now",
                    self._due[-1],
                )
            self.masks.release()

    def _prune(self, args: TrainingArguments, stage: int, model: nn.Module, kwargs: dict[str, Any]) -> None:
        batches = self._calibration
        if batches is None:
            batches = drawn(kwargs["train_dataloader"], args, self._batches, self.seed)
        batches = batches[args.process_index :: args.world_size] or batches
        share = None if Pattern.parse(self.pattern).of else self.sparsity * (1 - (1 - (stage + 1) / len(self._due)) ** 3)
        if self.masks is not None:
            self.masks.release()
        self.masks = prune(
            model,
            batches,
            share,
            self.pattern,
            modules=self.modules,
            optimizer=_window(kwargs.get("optimizer")) if self.options.method == "mfac" else None,
            **self._given,
        ).hold()
        logger.info("stage %d of %d: %.1f%% of the weights are zero", stage + 1, len(self._due), 100 * self.masks.sparsity())

    def _saved(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> Masks:
        """Find the masks of the loaded checkpoint, which are masks whose zeros the weights have."""
        given = args.resume_from_checkpoint
        for folder in [*([Path(given)] if isinstance(given, str) else []), _checkpoint(args, state)]:
            if (folder / FILE).is_file():
                masks = Masks.load(model, folder)
                if masks.are_zero():
                    return masks
        logger.warning("no %s of the checkpoint that was resumed: a weight that is zero is taken for a pruned one", FILE)
        return Masks.of_zeros(model, self.modules)


def drawn(loader: Any, args: TrainingArguments, number: int, seed: int) -> list[Any]:
    """Draw batches of the training data for calibration, without a change in the order of training or in random numbers."""
    data, size = loader.dataset, args.per_device_train_batch_size
    known = hasattr(data, "__len__")  # of a stream, the first batches are taken
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = DataLoader(data, size, shuffle=known, collate_fn=loader.collate_fn, generator=generator)
        return list(islice(batches, number))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Give the folder of this step's checkpoint. In a hyperparameter search it is in the trial's own folder."""
    name = f"checkpoint-{state.global_step}"
    folders = [Path(str(args.output_dir), name), *sorted(Path(str(args.output_dir)).glob(f"run-*/{name}"))]
    there = [folder for folder in folders if folder.is_dir()]
    return max(there, key=lambda folder: folder.stat().st_mtime) if there else folders[0]


def _window(optimizer: Any) -> Any:
    """Give the optimizer if it is of the M-FAC family and its window has entries; else None."""
    ours = _mfac(optimizer)
    return ours if ours is not None and int(ours.setup().counters.step) > 0 else None


def _mfac(optimizer: Any) -> Any:
    """Give the optimizer if it is of the M-FAC family; else None."""
    ours = unwrapped(optimizer)
    return ours if ours is not None and hasattr(ours.options, "damping") and hasattr(ours.options, "window_size") else None
