"""What all recipes share: arguments and their checks, training with the stock Trainer, results, the closing table."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from bbc_news import UsageError
from datasets import Dataset
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames

import hf_efcp  # makes its names valid for --optim

POLYNOMIAL_END = 1e-7  # transformers' default lr_end


def option(default, help: str):
    """A field that becomes a flag."""
    return dataclasses.field(default=default, metadata={"help": help})


# Arguments ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ModelArguments:
    """Where the model comes from."""

    model_name_or_path: str | None = option(None, "Model on the hub or local folder.")
    tokenizer_name: str | None = option(None, "Tokenizer name or folder, if it is not the model's.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = option(False, "Run the code that comes with the model on the hub.")

    @property
    def hub(self) -> dict:
        """What every `from_pretrained` of this model takes."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


@dataclasses.dataclass
class DataArguments:
    """Where the data comes from, and how much of it is used."""

    dataset_name: str | None = option(None, "Data set on the hub.")
    dataset_config_name: str | None = option(None, "Configuration of the data set on the hub, such as sst2 of glue.")
    train_file: str | None = option(None, "Local training data: a .csv, .tsv, .json or .jsonl file.")
    validation_file: str | None = option(None, "Local validation data, needed beside --train_file.")
    max_train_samples: int | None = option(None, "Train on this many examples, drawn at random.")
    max_eval_samples: int | None = option(None, "Evaluate on this many examples of each split, drawn at random.")
    split_seed: int = option(0, "Seed of the BBC News split and of the draw of samples. --seed does not change them.")

    def sample(self, split: str, rows: Dataset) -> Dataset:
        """At most max_train_samples or max_eval_samples rows; drawn, because many data sets are sorted."""
        limit = self.max_train_samples if split == "train" else self.max_eval_samples
        return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=self.split_seed).select(range(limit))


@dataclasses.dataclass
class CommonTrainingArguments(TrainingArguments):
    """The Trainer's arguments, with the recipes' defaults."""

    optim: OptimizerNames | str = dataclasses.field(
        default="efcp_lowrank_mfac", metadata={"help": "The optimizer: hf_efcp's or any of transformers'."}
    )
    learning_rate: float = option(1e-4, "The initial learning rate.")
    per_device_train_batch_size: int = option(16, "Training batch size per device.")
    per_device_eval_batch_size: int = option(32, "Evaluation batch size per device.")
    num_train_epochs: float = option(1.0, "Number of passes over the training data.")
    logging_steps: float = option(20, "Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = option("none", "Integrations that get the logs, such as tensorboard or wandb.")

    def __post_init__(self):
        """Default to training and evaluation; no pinned memory, and no warning about it, on a CPU."""
        chosen = self.do_train or self.do_eval or self.do_predict
        super().__post_init__()
        if not chosen:
            self.do_train = self.do_eval = True
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


def parse(groups: tuple[type, ...], description: str, argv: list[str] | None) -> tuple:
    """The argument groups, from flags or from one .json file.

    Args:
        groups: dataclasses.
        description: for `--help`.
        argv: the flags; None: the command line's.

    Raises:
        UsageError: a bad value or, in the file, an unknown name.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        groups,
        description=description,
        usage="%(prog)s [--flag value ...] | %(prog)s config.json   (--help lists the flags)",
    )
    config = argv[0] if len(argv) == 1 and argv[0].endswith(".json") else None
    try:
        if config:
            return parser.parse_dict(json.loads(Path(config).read_text()))
        return parser.parse_args_into_dataclasses(argv)
    except (OSError, TypeError, ValueError) as error:  # also the Trainer's and the optimizer's own checks
        raise UsageError(f"configuration file {config!r}: {error}" if config else str(error)) from None


def check_files(data: DataArguments, suffixes: Iterable[str], needed: set[str]) -> dict[str, str]:
    """The local files by split.

    Args:
        data: the arguments, among them maybe `test_file`.
        suffixes: what a file's name may end in.
        needed: splits that local data must have.

    Raises:
        UsageError: what is wrong before anything is loaded.
    """
    files = {split: getattr(data, f"{split}_file", None) for split in ("train", "validation", "test")}
    files = {split: file for split, file in files.items() if file}
    if files and data.dataset_name:
        raise UsageError(f"--dataset_name and --{next(iter(files))}_file are both given: choose one")
    if files and not needed <= set(files):
        names = " and ".join(f"--{split}_file" for split in ("train", "validation") if split in needed)
        raise UsageError(f"local data needs {'both ' * (len(needed) > 1)}{names}, given: {', '.join(files)}")
    for split, file in files.items():
        if Path(file).suffix not in suffixes:
            raise UsageError(f"--{split}_file {file!r}: the name must end in {', '.join(suffixes)}")
        if not Path(file).is_file():
            raise UsageError(f"--{split}_file {file!r} does not exist")
    if data.dataset_config_name and not data.dataset_name:
        raise UsageError("--dataset_config_name needs --dataset_name")
    check_integers(data, max_train_samples=1, max_eval_samples=1)
    return files


def check(arguments, name: str, holds: Callable, allowed: str) -> None:
    """Raise UsageError for a field whose value does not hold, or is of another type: a .json file's are not converted."""
    value = getattr(arguments, name)
    try:
        good = holds(value)
    except TypeError:
        good = False
    if not good:
        raise UsageError(f"--{name} {value!r}: must be {allowed}")


def check_integers(arguments, **least: int) -> None:
    """Raise UsageError for a field that is neither None nor an integer of at least so much."""
    for name, bound in least.items():
        check(arguments, name, lambda x, b=bound: x is None or (isinstance(x, int) and x >= b), f"an integer >= {bound}")


def words(value: list[str] | str | None) -> list[str]:
    """Names given one by one, separated by commas, or both."""
    pieces = [value] if isinstance(value, str) else value or []
    return [word.strip() for piece in pieces for word in piece.split(",") if word.strip()]


def check_resume(args) -> None:
    """Make `resume_from_checkpoint` a folder, if it is given ("true": the latest); raises UsageError if there is none."""
    resume = args.resume_from_checkpoint
    if resume and str(resume).lower() == "true":
        args.resume_from_checkpoint = Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir)
    if resume and not (args.resume_from_checkpoint and Path(args.resume_from_checkpoint).is_dir()):
        raise UsageError(f"--resume_from_checkpoint {resume!r}: no such folder, or no checkpoint in {args.output_dir!r}")


def check_schedule(args) -> None:
    """Raise UsageError for a learning rate that the polynomial schedule, which falls to lr_end, cannot start from."""
    if args.lr_scheduler_type == "polynomial":
        end = (getattr(args, "lr_scheduler_kwargs", None) or {}).get("lr_end", POLYNOMIAL_END)
        check(args, "learning_rate", lambda x: x > end, f"> {end}, where --lr_scheduler_type polynomial ends")


# Training -----------------------------------------------------------------------------------------------------------------


class StepTimer(TrainerCallback):
    """Milliseconds of every training step (forward, backward, optimizer), without data loading, logging and saving."""

    def __init__(self):
        self.milliseconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """See TrainerCallback."""
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """See TrainerCallback."""
        self.milliseconds.append(1000 * (time.perf_counter() - self._start))


@dataclasses.dataclass
class Record:
    """What a run reached and what it cost.

    Attributes:
        trainer: writes `*_results.json`.
        results: as in all_results.json.
        state: bytes of the optimizer's state by kind; empty before training.
        window: number of gradients in the optimizer's window; None: it has none.
    """

    trainer: Trainer
    results: dict = dataclasses.field(default_factory=dict)
    state: dict[str, int] = dataclasses.field(default_factory=dict)
    window: int | None = None

    def keep(self, split: str, metrics: dict, samples: int) -> None:
        """Add the metrics of a split, log them and write them."""
        metrics[f"{split}_samples"] = samples
        self.results.update(metrics)
        self.trainer.log_metrics(split, metrics)
        self.trainer.save_metrics(split, metrics)

    def train(self) -> None:
        """Train, save the model, the Trainer's state and the metrics of the train split."""
        trainer = self.trainer
        parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        timer = StepTimer()
        trainer.add_callback(timer)
        metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        self.state, self.window = state_bytes(optimizer), window_size(optimizer)
        metrics |= {"train_steps": len(timer.milliseconds), "train_parameters": parameters}
        metrics |= {"train_optimizer_state_bytes": sum(self.state.values())}
        if timer.milliseconds:  # none where the run to resume was finished
            metrics["train_ms_per_step"] = statistics.median(timer.milliseconds)
        trainer.save_model()
        trainer.save_state()
        self.keep("train", metrics, len(trainer.train_dataset))


def state_bytes(optimizer) -> dict[str, int]:
    """Bytes of the optimizer's state by kind."""
    if hasattr(optimizer, "memory_footprint"):
        return dict(optimizer.memory_footprint())
    kinds: dict[str, int] = {}
    for state in optimizer.state.values():
        for kind, value in state.items():
            if isinstance(value, torch.Tensor):
                kinds[kind] = kinds.get(kind, 0) + value.numel() * value.element_size()
    return kinds


def window_size(optimizer) -> int | None:
    """Number of gradients in the optimizer's window; None: it is none of hf_efcp's."""
    return getattr(getattr(optimizer, "options", None), "window_size", None)


def run(main: Callable[[], object]) -> None:
    """A recipe's command: a mistake of the user's is one line on stderr and exit status 2."""
    try:
        main()
    except (UsageError, hf_efcp.OptionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# Closing table ------------------------------------------------------------------------------------------------------------


def human_bytes(count: float) -> str:
    """`1536` as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024


def _cost(name: str, count: int, parameters: int, note: str = "") -> tuple[str, str, str]:
    return name, human_bytes(count), f"{count / parameters:.2f} bytes per parameter{note}"


def cost_rows(results: dict, state: dict[str, int], window: int | None) -> list[tuple[str, str, str]]:
    """Rows of the closing table: time and memory.

    Args:
        results: as in all_results.json; what is absent is left out.
        state: bytes of the optimizer's state by kind; empty: no training.
        window: number of gradients that dense M-FAC would keep, as 4-byte rows, beside a Gram matrix; None: no such line.
    """
    rows = []
    if "train_runtime" in results:
        minutes, seconds = divmod(round(results["train_runtime"]), 60)
        rows.append(("training time", f"{minutes} min {seconds:02d} s", f"{results['train_steps']} steps"))
    if "train_ms_per_step" in results:
        rows.append(("time per step", f"{results['train_ms_per_step']:.0f} ms", "median"))
    if state:
        parameters, total = results["train_parameters"], sum(state.values())
        rows.append(_cost("optimizer state", total, parameters))
        rows += [(f"  of it {kind}", human_bytes(n), "") for kind, n in state.items() if total / 1000 < n < total]
        rows.append(_cost("  AdamW's would be", 8 * parameters, parameters, ", float32"))
        if window:
            dense = 4 * window * parameters + 8 * window**2
            rows.append(_cost("  dense M-FAC's would be", dense, parameters, f", window_size={window}"))
    return rows


def table(title: str, rows: list[tuple[str, str, str]]) -> str:
    """Rows (name, value, note) under a title, aligned."""
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows]
    return "\n".join([title, *lines])
