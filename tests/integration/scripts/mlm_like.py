"""Fill in masked tokens: text files in, one example a line; model, metrics and state out."""

import math
import sys
from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
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
    mlm_probability: float = 0.15


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
    model = AutoModelForMaskedLM.from_pretrained(name, config=config)

    def encode(rows):
        lines = [line for line in rows["text"] if line.strip()]
        return tokenizer(lines, truncation=True, max_length=data_args.max_seq_length, return_special_tokens_mask=True)

    with args.main_process_first(desc="encode"):
        data = data.map(encode, batched=True, remove_columns=["text"])

    trainer = Trainer(
        model,
        args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability),
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
