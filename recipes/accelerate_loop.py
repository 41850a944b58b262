"""Fine-tune a text classifier in a plain Accelerate loop, without Trainer.

The same model, data and flags as text_classification.py; the training loop is here to be read and changed. Checkpoints hold
everything: a resumed run, from the middle of an epoch too, is bit for bit the run that was not interrupted.

    python recipes/accelerate_loop.py
    accelerate launch recipes/accelerate_loop.py --optim efcp_sparse_mfac --optim_args density=0.02 --mixed_precision bf16
    python recipes/accelerate_loop.py --checkpointing_steps 50 --gradient_accumulation_steps 2
    python recipes/accelerate_loop.py --checkpointing_steps 50 --gradient_accumulation_steps 2 --resume_from_checkpoint true
"""

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import common
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from bbc_news import UsageError
from classification import (
    DataArguments,
    ModelArguments,
    check_arguments,
    closing_table,
    load_examples,
    load_model,
    load_tokenizer,
)
from common import option
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_scheduler

import hf_efcp
from hf_efcp import optimizer_cls_and_kwargs

OPTIMIZERS = [*hf_efcp.list_optimizers(), "adamw"]
SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
PRECISIONS = ["no", "fp16", "bf16"]
BATCHING = ["per_device_train_batch_size", "gradient_accumulation_steps"]
PRINTED = ["loss", "learning_rate", "grad_norm", "kappa", "error_share", "eval_accuracy", "eval_loss"]  # kept and tracked: all


@dataclasses.dataclass
class LoopArguments:
    """How to train."""

    output_dir: str = option("outputs/accelerate_loop", "Folder for the results, the model and checkpoints.")
    optim: str = option("efcp_lowrank_mfac", f"The optimizer: {', '.join(OPTIMIZERS)}.")
    optim_args: str | None = option(None, "Its options, as Trainer takes them: rank=4,window_size=32 or a JSON object.")
    learning_rate: float = option(1e-4, "The highest learning rate.")
    weight_decay: float = option(0.0, "Decoupled weight decay of matrices; biases and norms have none.")
    lr_scheduler_type: str = option("linear", f"Course of the learning rate: {', '.join(SCHEDULERS)}.")
    num_warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.")
    num_train_epochs: int = option(1, "Number of passes over the training data.")
    max_train_steps: int | None = option(None, "Number of optimizer steps, instead of --num_train_epochs.")
    per_device_train_batch_size: int = option(16, "Training batch size per device.")
    per_device_eval_batch_size: int = option(32, "Evaluation batch size per device.")
    gradient_accumulation_steps: int = option(1, "Number of batches to a step.")
    mixed_precision: str | None = option(None, f"{', '.join(PRECISIONS)}. Default: as `accelerate config` or launch says.")
    max_grad_norm: float = option(1.0, "Clip the gradient at this norm; 0: do not.")
    seed: int = option(42, "Seed of the new head, of dropout and of the order of the examples.")
    logging_steps: int = option(20, "Log every so many steps.")
    checkpointing_steps: str | None = option(None, "Save a checkpoint every so many steps, or after every epoch: epoch.")
    resume_from_checkpoint: str | None = option(None, "Checkpoint folder to go on from; true: the latest of --output_dir.")
    with_tracking: bool = option(False, "Send the logs to the trackers of --report_to.")
    report_to: str = option("all", "Tracker, such as tensorboard or wandb; all: those that are installed.")


@dataclasses.dataclass
class Progress:
    """Where a run is: what a checkpoint has to know beside the states that `Accelerator.save_state` writes.

    Attributes:
        run: the settings that fix the order of the examples; a resumed run needs the same.
        epoch: number of whole epochs so far.
        batch: number of batches so far in this epoch.
        global_step: number of optimizer steps so far.
        loss_sum: sum of the losses of all steps.
        recent: losses of the steps since the last log.
        log_history: what was logged.
    """

    run: dict
    epoch: int = 0
    batch: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    recent: list[float] = dataclasses.field(default_factory=list)
    log_history: list[dict] = dataclasses.field(default_factory=list)

    def write(self, folder: Path) -> None:
        """As trainer_state.json."""
        (folder / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(self), indent=1))

    def read(self, folder: Path) -> None:
        """From a checkpoint of the same run; raises UsageError for another one."""
        try:
            saved = Progress(**json.loads((folder / "trainer_state.json").read_text()))
        except (OSError, TypeError, ValueError):
            raise UsageError(f"--resume_from_checkpoint {str(folder)!r}: not a whole checkpoint of this recipe") from None
        for name, ours in self.run.items():
            if saved.run.get(name) != ours:
                theirs = saved.run.get(name)
                raise UsageError(f"--resume_from_checkpoint {str(folder)!r}: made with {name} {theirs!r}, this run has {ours!r}")
        vars(self).update(vars(saved))


def check_loop_arguments(args: LoopArguments) -> None:
    """Raise UsageError or OptionError for what is wrong, before anything is loaded."""
    for name, valid in (("optim", OPTIMIZERS), ("lr_scheduler_type", SCHEDULERS), ("mixed_precision", [None, *PRECISIONS])):
        common.check(args, name, valid.__contains__, f"one of {', '.join(filter(None, valid))}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        common.check(args, name, lambda x: 0 <= x < math.inf, "a finite number >= 0")
    steps = args.checkpointing_steps
    if steps is not None and steps != "epoch" and not (str(steps).isdigit() and int(steps) > 0):
        raise UsageError(f"--checkpointing_steps {steps!r}: must be an integer >= 1, or epoch")
    integers = [field.name for field in dataclasses.fields(args) if field.type in (int, int | None)]
    common.check_integers(args, **{name: 0 if name in ("num_warmup_steps", "seed") else 1 for name in integers})
    if args.optim != "adamw":
        optimizer_cls_and_kwargs(args)
    elif args.optim_args:
        raise UsageError(f"--optim_args {args.optim_args!r}: adamw takes none here")


def make_accelerator(args: LoopArguments) -> Accelerator:
    """The accelerator; raises UsageError where this machine has no such precision or tracker."""
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=args.report_to if args.with_tracking else None,
            project_dir=args.output_dir,
            # The order of an epoch depends on seed and epoch only, which is what lets a resumed run skip to its place in it.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        )
    except ValueError as error:  # a precision that this machine lacks, an unknown tracker
        raise UsageError(str(error)) from None
    # On a CPU accelerate would compute in fp32, without a word.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--mixed_precision 'fp16': not on a CPU, where bf16 works")
    if args.with_tracking and not accelerator.log_with:
        raise UsageError(f"--with_tracking: no tracker for --report_to {args.report_to!r} is installed")
    return accelerator


def make_optimizer(model, args: LoopArguments) -> torch.optim.Optimizer:
    """The optimizer by name, with the defaults of `--optim`; 1-D tensors (biases, norms) get no weight decay."""
    groups = hf_efcp.parameter_groups(model, args.weight_decay)
    if args.optim == "adamw":
        return torch.optim.AdamW(groups, lr=args.learning_rate)
    _, options = optimizer_cls_and_kwargs(args)
    return hf_efcp.create_optimizer(args.optim, groups, **options)


def make_loader(rows, collate, batch_size: int, shuffle: bool = False) -> DataLoader:
    """A loader with a generator of its own: starting an epoch or an evaluation does not shift dropout's random numbers."""
    return DataLoader(rows, batch_size, shuffle=shuffle, collate_fn=collate, generator=torch.Generator())


@torch.no_grad()
def evaluate(accelerator: Accelerator, model, loader) -> dict[str, float]:
    """Accuracy and mean loss over all processes."""
    model.eval()
    logits, labels = [], []
    for batch in loader:
        gathered = accelerator.gather_for_metrics((model(**batch).logits.float(), batch["labels"]))
        for kept, part in zip((logits, labels), gathered, strict=True):
            kept.append(part.cpu())
    logits, labels = torch.cat(logits), torch.cat(labels)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return {"accuracy": (logits.argmax(-1) == labels).double().mean().item(), "loss": loss.item()}


def log(accelerator: Accelerator, progress: Progress, epoch: float, values: dict[str, float]) -> None:
    """Keep and track the values; print some."""
    progress.log_history.append({"epoch": epoch, **values, "step": progress.global_step})
    shown = "  ".join(f"{name} {values[name]:.4g}" for name in PRINTED if name in values)
    accelerator.print(f"step {progress.global_step}  epoch {epoch:.2f}  {shown}")
    accelerator.log(values, step=progress.global_step)


def save_checkpoint(accelerator: Accelerator, progress: Progress, output_dir: str) -> None:
    """Everything that a resumed run needs; trainer_state.json comes last and says that the checkpoint is whole."""
    folder = Path(output_dir, f"checkpoint-{progress.global_step}")
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress.write(folder)


def train_epoch(accelerator, model, optimizer, scheduler, loader, progress: Progress, args: LoopArguments) -> list[float]:
    """Train to the end of the epoch, or to the last step; returns the milliseconds of each step."""
    model.train()
    loader.set_epoch(progress.epoch)
    batches = loader
    if progress.batch == len(loader):  # saved after the epoch's last step; skipping all of them fails in Accelerate before 1.9
        batches = []
    elif progress.batch:
        batches = skip_first_batches(loader, progress.batch)
        batches.set_epoch(progress.epoch)
    losses, milliseconds, start = [], [], time.perf_counter()
    for batch in batches:
        # Inside `accumulate` step and zero_grad do nothing until enough batches have come. The last batch of an epoch always
        # makes a step; where too few have come, its gradient is smaller, because each part is divided by the full number.
        with accelerator.accumulate(model):
            learning_rate = scheduler.get_last_lr()[0]
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.detach().float())
        progress.batch += 1
        if not accelerator.sync_gradients:
            continue

        progress.global_step += 1
        progress.recent.append(accelerator.reduce(torch.stack(losses).mean(), "mean").item())
        progress.loss_sum += progress.recent[-1]
        milliseconds.append(1000 * (time.perf_counter() - start))
        if progress.global_step % args.logging_steps == 0:
            values = {"loss": statistics.mean(progress.recent), "learning_rate": learning_rate}
            if args.max_grad_norm:
                values["grad_norm"] = float(grad_norm)
            if hasattr(optimizer.optimizer, "diagnostics"):  # accelerate wraps it
                values |= optimizer.optimizer.diagnostics()
            log(accelerator, progress, progress.epoch + progress.batch / len(loader), values)
            progress.recent.clear()
        if args.checkpointing_steps not in (None, "epoch") and progress.global_step % int(args.checkpointing_steps) == 0:
            save_checkpoint(accelerator, progress, args.output_dir)
        if progress.global_step == args.max_train_steps:
            break
        losses, start = [], time.perf_counter()
    if progress.batch == len(loader):
        progress.epoch, progress.batch = progress.epoch + 1, 0
    return milliseconds


def write_results(folder: Path, results: dict[str, dict], model, tokenizer, progress: Progress) -> None:
    """The model, the figures of every split, and what was logged."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress.write(folder)
    for name, values in results.items():
        (folder / f"{name}_results.json").write_text(json.dumps(values, indent=1))


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; returns what all_results.json gets.

    Raises:
        UsageError: a mistake in the arguments or the data; nothing was trained or written.
    """
    model_args, data, args = common.parse((ModelArguments, DataArguments, LoopArguments), __doc__.split("\n")[0], argv)
    files = check_arguments(data, args)
    check_loop_arguments(args)
    config, tokenizer = load_tokenizer(model_args, data.max_seq_length)
    accelerator = make_accelerator(args)
    with accelerator.main_process_first():
        task = load_examples(data, files, tokenizer, config.label2id)
    if "test" in task.examples and "test" not in task.labelled:
        raise UsageError("the test split has no labels, and this recipe does not predict: leave it out")
    set_seed(args.seed, device_specific=True)  # every process its own dropout; the head is that of the first one
    model = load_model(model_args, config, task.names)

    collate, samples = DataCollatorWithPadding(tokenizer), {split: len(rows) for split, rows in task.examples.items()}
    loader = make_loader(task.examples["train"], collate, args.per_device_train_batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model, args), loader)
    evaluated = {
        split: accelerator.prepare(make_loader(task.examples[split], collate, args.per_device_eval_batch_size))
        for split in task.labelled
    }
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * math.ceil(len(loader) / args.gradient_accumulation_steps)
    # A prepared scheduler advances once per process at each step.
    counts = {"num_warmup_steps": args.num_warmup_steps, "num_training_steps": args.max_train_steps}
    counts = {name: count * accelerator.num_processes for name, count in counts.items()}
    scheduler = accelerator.prepare(get_scheduler(args.lr_scheduler_type, optimizer, **counts))

    run = {name: getattr(args, name) for name in ("optim", "seed", *BATCHING)}
    progress = Progress(run | {"num_processes": accelerator.num_processes, "train_samples": samples["train"]})
    if args.resume_from_checkpoint:
        progress.read(Path(args.resume_from_checkpoint))
        accelerator.load_state(args.resume_from_checkpoint)
    if args.with_tracking:
        accelerator.init_trackers(Path(__file__).stem, config={name: str(value) for name, value in vars(args).items()})

    scores, milliseconds, first_step, start = None, [], progress.global_step, time.perf_counter()
    while progress.global_step < args.max_train_steps:
        milliseconds += train_epoch(accelerator, model, optimizer, scheduler, loader, progress, args)
        scores = evaluate(accelerator, model, evaluated["eval"])
        epoch = progress.epoch + progress.batch / len(loader)
        log(accelerator, progress, epoch, {f"eval_{name}": value for name, value in scores.items()})
        if args.checkpointing_steps == "epoch":
            save_checkpoint(accelerator, progress, args.output_dir)
    seconds = time.perf_counter() - start

    state = common.state_bytes(optimizer.optimizer)
    train = {
        "loss": progress.loss_sum / progress.global_step,
        "runtime": seconds,
        "steps": progress.global_step - first_step,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer_state_bytes": sum(state.values()),
    }
    if milliseconds:  # none where the run to resume was finished
        train["ms_per_step"] = statistics.median(milliseconds)
    found = {"train": train, "eval": scores or evaluate(accelerator, model, evaluated["eval"])}
    if "test" in evaluated:
        found["test"] = evaluate(accelerator, model, evaluated["test"])
    results = {
        split: {f"{split}_{name}": value for name, value in {**values, "samples": samples[split]}.items()}
        for split, values in found.items()
    }
    results["all"] = {name: value for values in results.values() for name, value in values.items()}
    if accelerator.is_main_process:
        write_results(Path(args.output_dir), results, accelerator.unwrap_model(model), tokenizer, progress)
        title = f"{args.optim} on {task.title}; files in {args.output_dir}"
        print("\n" + closing_table(title, results["all"], state, common.window_size(optimizer.optimizer), task.eval_name))
    # DDP goes before its process group: as the group's last owner it can wait for gloo's threads, and they for it, for ever.
    (model,) = accelerator.free_memory(model)
    accelerator.end_training()
    return results["all"]


if __name__ == "__main__":
    common.run(main)
