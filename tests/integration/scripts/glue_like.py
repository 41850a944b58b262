"""Classify sentences: csv or json files of `sentence,label` rows in; model, metrics and state out."""

import sys
from dataclasses import dataclass

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    model_name_or_path: str
    cache_dir: str | None = None


@dataclass
class DataArguments:
    train_file: str
    validation_file: str
    max_seq_length: int = 32


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    kind = data_args.train_file.rsplit(".", 1)[-1]
    data = load_dataset(kind, data_files=files, cache_dir=model_args.cache_dir)
    labels = sorted(set(data["train"]["label"]))

    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name, num_labels=len(labels))
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config)

    def encode(rows):
        encoded = tokenizer(rows["sentence"], truncation=True, max_length=data_args.max_seq_length)
        return {**encoded, "labels": [labels.index(label) for label in rows["label"]]}

    with args.main_process_first(desc="encode"):
        data = data.map(encode, batched=True, remove_columns=["sentence", "label"])

    trainer = Trainer(
        model,
        args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
