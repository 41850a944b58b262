"""Fine-tune a text classifier with a compressed full-matrix optimizer.

Without arguments: the pretrained MiniLM-L6 BERT on BBC News (5 topics) with `--optim efcp_lowrank_mfac`, offline, in a few
minutes on two CPU cores. With arguments: any model and data set of the hub, or local csv/tsv/json/jsonl files:

    python recipes/text_classification.py
    python recipes/text_classification.py --optim adamw_torch
    python recipes/text_classification.py --model_name_or_path bert-base-uncased --dataset_name glue --dataset_config_name sst2
    python recipes/text_classification.py --train_file train.csv --validation_file dev.csv --efcp_rank 8 --efcp_window_size 64
    python recipes/text_classification.py settings.json
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_efcp import EFCPTrainingArguments, OptionError
from hf_efcp.demo.bbc import bbc_news, minilm_folder
from hf_efcp.demo.running import costs, parse, summary

# Column names of common data sets, tried in this order: pairs before single texts, because GLUE's pairs contain "sentence".
PAIRS = [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")]
TEXT_COLUMNS = [*PAIRS, ("sentence",), ("text",)]
LABEL_COLUMNS = ["label", "labels"]


@dataclass
class Arguments:
    """Which model to fine-tune, on which texts and labels."""

    model_name_or_path: str | None = HfArg(default=None, help="Model on the hub or local folder. Default: MiniLM-L6 BERT.")
    dataset_name: str | None = HfArg(
        default=None, help="Data set on the hub, or bbc_articles or bbc_sentences (offline). Default: bbc_articles."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration on the hub, such as sst2 of glue.")
    train_file: str | None = HfArg(default=None, help="Local training data: a .csv, .tsv, .json or .jsonl file.")
    validation_file: str | None = HfArg(default=None, help="Local validation data, needed beside --train_file.")
    test_file: str | None = HfArg(default=None, help="Local data for --do_predict; it needs no labels.")
    text_column: str | None = HfArg(default=None, help="Column of the text, or two of a pair, as in question,answer.")
    label_column: str | None = HfArg(default=None, help="Column of the classes, words or integers. Default: label or labels.")
    max_seq_length: int = HfArg(default=128, help="Longest input in tokens; longer texts are cut.")
    pad_to_max_length: bool = HfArg(default=False, help="Pad every input to --max_seq_length, not to its batch's longest.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many examples, drawn at random.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on this many examples, drawn at random.")
    split_seed: int = HfArg(default=0, help="Seed of BBC News's split and of the draw of samples. --seed does not change them.")


@dataclass
class TrainingArguments(EFCPTrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train, --do_eval nor --do_predict: train and eval."""

    output_dir: str | None = HfArg(default="outputs/text_classification", help="Folder for results, model and checkpoints.")
    learning_rate: float = HfArg(default=1e-4, help="The highest learning rate.")
    per_device_train_batch_size: int = HfArg(default=16, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Evaluation batch size per device.")
    num_train_epochs: float = HfArg(default=1.0, help="Number of passes over the training data.")
    logging_steps: float = HfArg(default=20, help="Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = HfArg(default="none", help="Integrations that get the logs, such as tensorboard or wandb.")
    dataloader_pin_memory: bool = HfArg(default=torch.accelerator.is_available(), help="Pin memory; useless without a GPU.")

    def __post_init__(self):
        """Train and evaluate where nothing is asked for."""
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = self.do_eval = True
        super().__post_init__()


def load_texts(ours: Arguments) -> DatasetDict:
    """Load the splits "train", "validation" (or only "test", to evaluate on) and, for predictions, "test"."""
    files = {"train": ours.train_file, "validation": ours.validation_file, "test": ours.test_file}
    files = {split: file for split, file in files.items() if file}
    if not files:
        name = ours.dataset_name or "bbc_articles"
        return bbc_news(name[4:], seed=ours.split_seed) if name[:4] == "bbc_" else load_dataset(name, ours.dataset_config_name)
    if ours.dataset_name:
        raise OptionError(f"--dataset_name and --{next(iter(files))}_file are both given: choose one")
    if not {"train", "validation"} <= files.keys():
        raise OptionError(f"local data needs both --train_file and --validation_file, given: {', '.join(files)}")
    kind = Path(ours.train_file).suffix
    if kind not in (".csv", ".tsv", ".json", ".jsonl"):
        raise OptionError(f"--train_file {ours.train_file!r}: the name must end in .csv, .tsv, .json or .jsonl")
    if kind in (".json", ".jsonl"):
        return load_dataset("json", data_files=files)
    # The words "NA" and "null" are legal texts and labels.
    return load_dataset("csv", data_files=files, keep_default_na=False, sep="\t" if kind == ".tsv" else ",")


def find_columns(rows: Dataset, ours: Arguments) -> tuple[list[str], str]:
    """Return (one or two text columns, label column): those that are named, else those with a usual name."""
    names = rows.column_names
    label = ours.label_column or next((name for name in LABEL_COLUMNS if name in names), None)
    usual = next((columns for columns in TEXT_COLUMNS if set(columns) <= set(names) - {label}), ())
    texts = [name.strip() for name in ours.text_column.split(",")] if ours.text_column else list(usual)
    for flag, columns in (("text_column", texts), ("label_column", [label])):
        if not set(columns) or not set(columns) <= set(names) or len(columns) > 2:
            given = getattr(ours, flag)
            raise OptionError(f"--{flag} {given!r}: one column (or two of texts) of the data, which has {', '.join(names)}")
    return texts, label


def class_names(rows: Dataset, column: str, known: dict[str, int]) -> dict:
    """Return value in the label column -> name of the class, in the order of the class numbers; a trained model's own order."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        classes = dict(enumerate(feature.names))
    elif "string" in feature.dtype or "int" in feature.dtype or feature.dtype == "bool":
        classes = {value: str(value) for value in sorted(set(rows[column]) - {None, ""})}
    else:
        raise OptionError(f"--label_column {column!r} holds {feature.dtype}: classes are needed, words or integers")
    if set(known) == set(classes.values()):
        classes = dict(sorted(classes.items(), key=lambda item: known[item[1]]))
    return classes


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    ours, args = parse((Arguments, TrainingArguments), __doc__.split("\n")[0], argv)
    source = ours.model_name_or_path or minilm_folder()
    data = load_texts(ours)
    evaluated = next((split for split in data if split.startswith("validation")), "test")
    texts, label = find_columns(data["train"], ours)
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    classes = class_names(data["train"], label, config.label2id)
    numbers = {value: number for number, value in enumerate(classes)}

    config.num_labels, config.id2label = len(classes), dict(enumerate(classes.values()))
    config.label2id = {name: number for number, name in config.id2label.items()}
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or ours.max_seq_length)
    if ours.max_seq_length > longest:
        raise OptionError(f"--max_seq_length {ours.max_seq_length}: this model takes at most {longest}")
    if tokenizer.pad_token is None:  # most decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id

    def encode(batch):
        padding = "max_length" if ours.pad_to_max_length else False
        tokens = tokenizer(*(batch[name] for name in texts), truncation=True, max_length=ours.max_seq_length, padding=padding)
        if label in batch:  # a value that the train split has not is a class that the model cannot learn: KeyError
            hidden = {-1, None, ""}  # the labels of the hub's test splits
            tokens["labels"] = [-100 if value in hidden and value not in numbers else numbers[value] for value in batch[label]]
        return tokens

    def examples(split: str, limit: int | None) -> Dataset:
        rows = data[split]
        if limit is not None and limit < len(rows):  # drawn, because many data sets are sorted
            rows = rows.shuffle(seed=ours.split_seed).select(range(limit))
        return rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")

    with args.main_process_first(desc="tokenizing"):
        train, held_out = examples("train", ours.max_train_samples), examples(evaluated, ours.max_eval_samples)
    set_seed(args.seed)  # the new head
    model = AutoModelForSequenceClassification.from_pretrained(
        source,
        config=config,
        dtype="float32",  # small updates vanish in 16-bit weights; --bf16 still computes in 16 bits
        ignore_mismatched_sizes=True,
    )
    # Its loss is a batch mean. Unless told, Trainer takes it for a sum: N processes or accumulation steps would give N times it.
    model.accepts_loss_kwargs = False

    def predicted(logits) -> np.ndarray:
        return np.argmax(logits[0] if isinstance(logits, tuple) else logits, axis=-1)

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((predicted(p.predictions) == p.label_ids).mean())},
    )
    results = {}
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        metrics |= {"train_samples": len(train), **costs(model, trainer.optimizer)}
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        results |= metrics
    if args.do_eval:
        metrics = trainer.evaluate() | {"eval_samples": len(held_out)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results |= metrics
    if args.do_predict:
        logits = trainer.predict(examples("test", None)).predictions
        if trainer.is_world_process_zero():
            names = {"prediction": [config.id2label[number] for number in predicted(logits)]}
            Dataset.from_dict(names).to_csv(Path(args.output_dir, "predictions.csv"))
    if trainer.is_world_process_zero():
        title = f"{args.optim.value} on {ours.dataset_name or ours.train_file or 'bbc_articles'}; files in {args.output_dir}"
        print("\n" + summary(title, results, "eval_accuracy", "eval_loss"))
    return results


if __name__ == "__main__":
    main()
