"""A Trainer callback that records a run for its report: options, memory, environment, logs and when they were written."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..bench.measuring import machine
from ..bench.reporting import versions_used
from ..cli.estimate import adamw_bytes
from ..distributed.fsdp2 import local
from ..integrations.checkpoints import unwrapped
from ..integrations.trainer_options import name_of
from ..options import OptionError, as_text
from .read import RECORD, VERSION

PAGE = "report.html"
logger = logging.getLogger("hf_efcp")
# What a reader wants to know of the training arguments.
_ARGUMENTS = ["learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs"]
_ARGUMENTS += ["max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "bf16", "fp16"]


class RunRecord(TrainerCallback):
    """Writes `efcp_run.json` into the output folder, and at the end `report.html`, on the first process."""

    def __init__(self) -> None:
        self._start = self._began = self._computed = 0.0
        self._times: list[tuple[int, float]] = []
        self._finished = False
        self._share: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin to count seconds; a run that is resumed counts on."""
        self._times, self._finished, self._share = [], False, None
        if state.global_step and (there := _there(args.output_dir)):
            self._times = [(step, seconds) for step, seconds in there["times"] if step <= state.global_step]
        self._began, self._computed = time.monotonic(), time.process_time()
        self._start = self._began - (self._times[-1][1] if self._times else 0.0)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note when it was."""
        if not self._finished and (not self._times or self._times[-1][0] < state.global_step):
            self._times.append((state.global_step, round(time.monotonic() - self._start, 3)))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what there is, so that a run that is killed has a record."""
        self._write(args, state, **kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write record and report."""
        self._finished = True
        if args.device.type == "cpu":
            self._share = (time.process_time() - self._computed) / max(1e-9, time.monotonic() - self._began)
        self._write(args, state, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write both anew where an evaluation follows the training."""
        if self._finished:
            self._write(args, state, **kwargs)

    def _write(
        self, args: TrainingArguments, state: TrainerState, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        ours, params = unwrapped(optimizer), [p for p in model.parameters() if p.requires_grad]
        config = getattr(model, "config", None)
        options = dataclasses.asdict(ours.options) if ours is not None else {}
        record = {
            "version": VERSION,
            "optimizer": {
                "name": name_of(args),
                "options": {name: as_text(value) for name, value in options.items()},
                "memory": _memory(optimizer),
                "adamw": adamw_bytes(params),
                "processes": args.world_size,
            },
            "model": {
                "class": type(model).__name__,
                "name": os.path.basename(str(getattr(config, "_name_or_path", "") or "")),
                "parameters": sum(p.numel() for p in model.parameters()),
                "trained": sum(p.numel() for p in params),
                "dtype": str(params[0].dtype).removeprefix("torch.") if params else "",
            },
            "arguments": {
                name: as_text(getattr(v, "value", v)) for name in _ARGUMENTS if (v := getattr(args, name, None)) is not None
            },
            "environment": machine(args.device) | versions_used(()) | {"transformers": transformers.__version__},
            "times": self._times,
            "processor_share": self._share,
            "log_history": state.log_history,
            "max_steps": state.max_steps,
            "finished": self._finished,
        }
        try:
            _put(record, Path(args.output_dir or ".", RECORD), page=self._finished)
        except (OptionError, OSError) as error:  # a run does not end for its report
            logger.warning("the training goes on, but its report was not written: %s", error)


def _put(record: dict[str, Any], file: Path, page: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".tmp")
    new.write_text(json.dumps(record, default=float) + "\n")
    new.replace(file)
    if page:
        from .page import write

        write([file.parent], file.with_name(PAGE))


def _there(folder: str | None) -> dict[str, Any] | None:
    """Give the record of the run that is resumed, if it can be read."""
    try:
        return json.loads(Path(folder or "", RECORD).read_text())
    except (OSError, ValueError):
        return None


def _memory(optimizer: Any) -> dict[str, int]:
    """Count the bytes of state by kind; of an optimizer that is not ours, by the names of its entries."""
    ours = unwrapped(optimizer)
    if ours is not None:  # not built yet: processes would have to meet
        return ours.memory_footprint() if ours.builder.setup is not None else {}
    sizes: dict[str, int] = {}
    for entry in getattr(optimizer, "state", {}).values():
        for name, t in entry.items() if isinstance(entry, dict) else ():
            if isinstance(t, torch.Tensor):
                sizes[str(name)] = sizes.get(str(name), 0) + local(t).numel() * t.element_size()
    return sizes
