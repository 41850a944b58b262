"""Predict the next token: text files in; model, metrics and state out."""

import math
import sys
from dataclasses import dataclass
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
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
    block_size: int = 16


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    data = load_dataset("text", data_files=files, cache_dir=model_args.cache_dir)

    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, config=config)

    def group_texts(rows):
        size = data_args.block_size
        blocks = {}
        for key, lists in rows.items():
            joined = list(chain.from_iterable(lists))
            blocks[key] = [joined[i : i + size] for i in range(0, len(joined) - size + 1, size)]
        return {**blocks, "labels": blocks["input_ids"]}

    with args.main_process_first(desc="encode"):
        data = data.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"])
        data = data.map(group_texts, batched=True)

    trainer = Trainer(
        model,
        args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
