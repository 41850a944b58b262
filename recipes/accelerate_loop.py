"""Fine-tune a text classifier in a plain Accelerate loop, without Trainer.

The same model, data and flags as text_classification.py; the training loop is here to be read and changed. Checkpoints hold
everything: a resumed run, from the middle of an epoch too, is bit for bit the run that was not interrupted.

    python recipes/accelerate_loop.py
    accelerate launch recipes/accelerate_loop.py --optim efcp_sparse_mfac --optim_args density=0.02 --mixed_precision bf16
    python recipes/accelerate_loop.py --checkpointing_steps 50 --gradient_accumulation_steps 2
    python recipes/accelerate_loop.py --checkpointing_steps 50 --gradient_accumulation_steps 2 --resume_from_checkpoint true
"""

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import ClassLabel, Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import get_last_checkpoint

import hf_efcp
from hf_efcp.demo.bbc import bbc_news, minilm_folder
from hf_efcp.demo.running import costs, parse, summary

# Of a log; kept and tracked: all.
PRINTED = ["loss", "learning_rate", "grad_norm", "efcp_kappa", "efcp_error_share", "eval_accuracy", "eval_loss"]


@dataclass
class Arguments:
    """Which model to fine-tune, on what, and how."""

    model_name_or_path: str | None = HfArg(default=None, help="Model on the hub or local folder. Default: MiniLM-L6 BERT.")
    dataset_name: str | None = HfArg(
        default=None, help="Data set on the hub, or bbc_articles or bbc_sentences (offline). Default: bbc_articles."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration on the hub, such as sst2 of glue.")
    train_file: str | None = HfArg(default=None, help="Local training data: a .csv, .json or .jsonl file.")
    validation_file: str | None = HfArg(default=None, help="Local validation data, needed beside --train_file.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    label_column: str = HfArg(default="label", help="Column of the classes, words or integers.")
    max_seq_length: int = HfArg(default=128, help="Longest input in tokens; longer texts are cut.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many examples, drawn at random.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on this many examples, drawn at random.")
    split_seed: int = HfArg(default=0, help="Seed of BBC News's split and of the draw of samples. --seed does not change them.")
    output_dir: str = HfArg(default="outputs/accelerate_loop", help="Folder for the results, the model and checkpoints.")
    optim: Literal[(*hf_efcp.list_optimizers(), "adamw")] = HfArg(default="efcp_lowrank_mfac", help="The optimizer.")
    optim_args: str | None = HfArg(default=None, help="Its options, as Trainer takes them: rank=4,window_size=32 or JSON.")
    learning_rate: float = HfArg(default=1e-4, help="The highest learning rate.")
    weight_decay: float = HfArg(default=0.0, help="Decoupled weight decay of matrices; biases and norms have none.")
    lr_scheduler_type: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = HfArg(
        default="linear", help="Course of the learning rate."
    )
    num_warmup_steps: int = HfArg(default=0, help="Steps over which the learning rate rises from 0.")
    num_train_epochs: int = HfArg(default=1, help="Number of passes over the training data.")
    max_train_steps: int | None = HfArg(default=None, help="Number of optimizer steps, instead of --num_train_epochs.")
    per_device_train_batch_size: int = HfArg(default=16, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Evaluation batch size per device.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Number of batches to a step.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = HfArg(default=None, help="Default: as `accelerate launch` says.")
    max_grad_norm: float = HfArg(default=1.0, help="Clip the gradient at this norm; 0: do not.")
    seed: int = HfArg(default=42, help="Seed of the new head, of dropout and of the order of the examples.")
    logging_steps: int = HfArg(default=20, help="Log every so many steps.")
    checkpointing_steps: str | None = HfArg(default=None, help="Save every so many steps, or after every epoch: epoch.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="Checkpoint to go on from; true: the latest of --output_dir.")
    with_tracking: bool = HfArg(default=False, help="Send the logs to the trackers of --report_to.")
    report_to: str = HfArg(default="all", help="Tracker, such as tensorboard or wandb; all: those that are installed.")

    def __post_init__(self):
        """Check what would be noticed late, or never."""
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: must be a finite number >= 0")
        for name in ("gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "logging_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be an integer >= 1")
        steps = self.checkpointing_steps
        if steps not in (None, "epoch") and not (str(steps).isdigit() and int(steps)):
            raise ValueError(f"--checkpointing_steps {steps!r}: must be an integer >= 1, or epoch")
        if self.optim != "adamw":
            hf_efcp.optimizer_cls_and_kwargs(self)
        elif self.optim_args:
            raise ValueError(f"--optim_args {self.optim_args!r}: adamw takes none here")
        if self.resume_from_checkpoint == "true":
            self.resume_from_checkpoint = Path(self.output_dir).is_dir() and get_last_checkpoint(self.output_dir)
            if not self.resume_from_checkpoint:
                raise ValueError(f"--resume_from_checkpoint true: no checkpoint in {self.output_dir!r}")


@dataclass
class Progress:
    """Where a run is: what a checkpoint has to know beside the states that `Accelerator.save_state` writes."""

    run: dict  # the settings that fix the order of the examples; a resumed run needs the same
    epoch: int = 0  # whole ones so far
    batch: int = 0  # batches so far in this epoch
    global_step: int = 0
    loss_sum: float = 0.0  # of all steps
    recent: list[float] = field(default_factory=list)  # losses since the last log
    log_history: list[dict] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """As trainer_state.json."""
        (folder / "trainer_state.json").write_text(json.dumps(asdict(self), indent=1))

    def read(self, folder: Path) -> None:
        """From a checkpoint of the same run; raises ValueError for another one."""
        try:
            saved = Progress(**json.loads((folder / "trainer_state.json").read_text()))
        except (OSError, TypeError, ValueError):
            raise ValueError(f"--resume_from_checkpoint {str(folder)!r}: not a whole checkpoint of this recipe") from None
        for name, ours in self.run.items():
            if saved.run.get(name) != ours:
                theirs = saved.run.get(name)
                raise ValueError(f"--resume_from_checkpoint {str(folder)!r}: made with {name} {theirs!r}, this run has {ours!r}")
        vars(self).update(vars(saved))


def load_examples(args: Arguments, tokenizer) -> tuple[Dataset, Dataset, list[str]]:
    """Load and tokenize; return the train split, the split to evaluate on, and the names of the classes."""
    if args.train_file:
        kind = "csv" if args.train_file.endswith(".csv") else "json"
        data = load_dataset(kind, data_files={"train": args.train_file, "validation": args.validation_file})
    elif (name := args.dataset_name or "bbc_articles")[:4] == "bbc_":
        data = bbc_news(name[4:], seed=args.split_seed)
    else:
        data = load_dataset(name, args.dataset_config_name)
    feature = data["train"].features[args.label_column]
    names = feature.names if isinstance(feature, ClassLabel) else sorted(set(data["train"][args.label_column]))
    values = range(len(names)) if isinstance(feature, ClassLabel) else names
    numbers = {value: number for number, value in enumerate(values)}

    def encode(batch):
        tokens = tokenizer(batch[args.text_column], truncation=True, max_length=args.max_seq_length)
        return {**tokens, "labels": [numbers[value] for value in batch[args.label_column]]}

    found = []
    evaluated = next((split for split in data if split.startswith("validation")), "test")
    for split, limit in (("train", args.max_train_samples), (evaluated, args.max_eval_samples)):
        rows = data[split]
        if limit is not None and limit < len(rows):  # drawn, because many data sets are sorted
            rows = rows.shuffle(seed=args.split_seed).select(range(limit))
        found.append(rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}"))
    return *found, [str(name) for name in names]


def make_accelerator(args: Arguments) -> Accelerator:
    """The accelerator; raises ValueError where this machine has no such precision or tracker."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
        # The order of an epoch depends on seed and epoch only, which is what lets a resumed run skip to its place in it.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    # On a CPU accelerate would compute in fp32, without a word.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision 'fp16': not on a CPU, where bf16 works")
    if args.with_tracking and not accelerator.log_with:
        raise ValueError(f"--with_tracking: no tracker for --report_to {args.report_to!r} is installed")
    return accelerator


def make_optimizer(model, args: Arguments) -> torch.optim.Optimizer:
    """The optimizer by name, with the defaults of `--optim`; 1-D tensors (biases, norms) get no weight decay."""
    groups = hf_efcp.parameter_groups(model, args.weight_decay)
    if args.optim == "adamw":
        return torch.optim.AdamW(groups, lr=args.learning_rate)
    _, options = hf_efcp.optimizer_cls_and_kwargs(args)
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


def train_epoch(accelerator, model, optimizer, scheduler, loader, progress: Progress, args: Arguments) -> list[float]:
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
            values |= hf_efcp.diagnostics(optimizer)  # none of AdamW
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


def write_results(folder: Path, results: dict[str, float], model, tokenizer, progress: Progress) -> None:
    """Write the model, the figures of every split, and what was logged."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress.write(folder)
    for split in ("train", "eval", "all"):
        values = {name: value for name, value in results.items() if split == "all" or name.startswith(split)}
        (folder / f"{split}_results.json").write_text(json.dumps(values, indent=1))


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    (args,) = parse((Arguments,), __doc__.split("\n")[0], argv)
    source = args.model_name_or_path or minilm_folder()
    accelerator = make_accelerator(args)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:  # most decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    with accelerator.main_process_first():
        train, evaluated, names = load_examples(args, tokenizer)
    set_seed(args.seed, device_specific=True)  # every process its own dropout; the head is that of the first one
    model = AutoModelForSequenceClassification.from_pretrained(
        source,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        dtype="float32",  # small updates vanish in 16-bit weights; --mixed_precision still computes in 16 bits
        ignore_mismatched_sizes=True,  # the head is new unless the model has one of this size
    )
    model.config.pad_token_id = tokenizer.pad_token_id

    collate = DataCollatorWithPadding(tokenizer)
    loader = make_loader(train, collate, args.per_device_train_batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model, args), loader)
    eval_loader = accelerator.prepare(make_loader(evaluated, collate, args.per_device_eval_batch_size))
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * math.ceil(len(loader) / args.gradient_accumulation_steps)
    # A prepared scheduler advances once per process at each step.
    counts = {"num_warmup_steps": args.num_warmup_steps, "num_training_steps": args.max_train_steps}
    counts = {name: count * accelerator.num_processes for name, count in counts.items()}
    scheduler = accelerator.prepare(get_scheduler(args.lr_scheduler_type, optimizer, **counts))

    fixed = ("optim", "seed", "per_device_train_batch_size", "gradient_accumulation_steps")
    run = {name: getattr(args, name) for name in fixed}
    progress = Progress(run | {"num_processes": accelerator.num_processes, "train_samples": len(train)})
    if args.resume_from_checkpoint:
        progress.read(Path(args.resume_from_checkpoint))
        accelerator.load_state(args.resume_from_checkpoint)
    if args.with_tracking:
        accelerator.init_trackers(Path(__file__).stem, config={name: str(value) for name, value in vars(args).items()})

    scores, milliseconds, first_step, start = None, [], progress.global_step, time.perf_counter()
    while progress.global_step < args.max_train_steps:
        milliseconds += train_epoch(accelerator, model, optimizer, scheduler, loader, progress, args)
        scores = evaluate(accelerator, model, eval_loader)
        epoch = progress.epoch + progress.batch / len(loader)
        log(accelerator, progress, epoch, {f"eval_{name}": value for name, value in scores.items()})
        if args.checkpointing_steps == "epoch":
            save_checkpoint(accelerator, progress, args.output_dir)
    seconds = time.perf_counter() - start
    scores = scores or evaluate(accelerator, model, eval_loader)
    results = {
        "train_loss": progress.loss_sum / progress.global_step,
        "train_runtime": seconds,
        "train_steps": progress.global_step - first_step,
        "train_samples": len(train),
        **costs(model, optimizer),
        **{f"eval_{name}": value for name, value in scores.items()},
        "eval_samples": len(evaluated),
    }
    if milliseconds:  # none where the run to resume was finished
        results["train_ms_per_step"] = statistics.median(milliseconds)
    if accelerator.is_main_process:
        write_results(Path(args.output_dir), results, accelerator.unwrap_model(model), tokenizer, progress)
        title = f"{args.optim} on {args.dataset_name or args.train_file or 'bbc_articles'}; files in {args.output_dir}"
        print("\n" + summary(title, results, "eval_accuracy", "eval_loss", "train_ms_per_step"))
    # DDP goes before its process group: as the group's last owner it can wait for gloo's threads, and they for it, for ever.
    (model,) = accelerator.free_memory(model)
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
