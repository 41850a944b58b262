"""Find answers in contexts: json files of `question, context, answer, answer_start` rows in; model, metrics and state out."""

import sys
from dataclasses import dataclass

from datasets import load_dataset
from qa_trainer import SpanTrainer
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed


@dataclass
class ModelArguments:
    model_name_or_path: str
    cache_dir: str | None = None


@dataclass
class DataArguments:
    train_file: str
    validation_file: str
    max_seq_length: int = 24


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    data = load_dataset("json", data_files=files, field="data", cache_dir=model_args.cache_dir)

    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForQuestionAnswering.from_pretrained(name, config=config)

    def encode(rows):
        encoded = tokenizer(
            rows["question"],
            rows["context"],
            truncation="only_second",
            max_length=data_args.max_seq_length,
            padding="max_length",
            return_offsets_mapping=True,
        )
        offsets = [
            [span if part == 1 else None for span, part in zip(spans, encoded.sequence_ids(i), strict=True)]
            for i, spans in enumerate(encoded.pop("offset_mapping"))
        ]
        firsts = rows["answer_start"]
        lasts = [first + len(answer) - 1 for first, answer in zip(firsts, rows["answer"], strict=True)]
        return {
            **encoded,
            "offsets": offsets,
            "start_positions": [_token_at(c, spans) for c, spans in zip(firsts, offsets, strict=True)],
            "end_positions": [_token_at(c, spans) for c, spans in zip(lasts, offsets, strict=True)],
        }

    with args.main_process_first(desc="encode"):
        encoded = data.map(encode, batched=True, remove_columns=data["train"].column_names)

    trainer = SpanTrainer(
        model,
        args,
        train_dataset=encoded["train"] if args.do_train else None,
        eval_dataset=encoded["validation"] if args.do_eval else None,
        processing_class=tokenizer,
        examples=data["validation"],
        offsets=encoded["validation"]["offsets"],
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


def _token_at(character, spans):
    """The token that holds a character of the context; 0, the first special token, where it was cut off."""
    return next((i for i, span in enumerate(spans) if span and span[0] <= character < span[1]), 0)


if __name__ == "__main__":
    main()
