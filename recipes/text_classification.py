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
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, set_seed

ACCURACY = Path(__file__).resolve().parent / "metrics" / "accuracy"


@dataclasses.dataclass
class RecipeTrainingArguments(common.CommonTrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train, --do_eval nor --do_predict: train and eval."""

    output_dir: str | None = option("outputs/text_classification", "Folder for the results, the model and checkpoints.")


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; returns what all_results.json gets.

    Raises:
        UsageError: a mistake in the arguments or the data; nothing was trained or written.
    """
    model_args, data, args = common.parse((ModelArguments, DataArguments, RecipeTrainingArguments), __doc__.split("\n")[0], argv)
    files = check_arguments(data, args)
    config, tokenizer = load_tokenizer(model_args, data.max_seq_length)
    with args.main_process_first(desc="reading and tokenizing the data"):
        task = load_examples(data, files, tokenizer, config.label2id)
    examples = task.examples
    set_seed(args.seed)  # the new head
    model = load_model(model_args, config, task.names)
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
        for split in task.labelled:
            record.keep(split, trainer.evaluate(examples[split], metric_key_prefix=split), len(examples[split]))
    if args.do_predict:
        predicted = classes(trainer.predict(examples.get("test", examples["eval"])).predictions)
        if trainer.is_world_process_zero():
            Dataset.from_dict({"prediction": [task.names[i] for i in predicted]}).to_csv(Path(args.output_dir, "predictions.csv"))
    if trainer.is_world_process_zero():
        title = f"{args.optim.value} on {task.title}; files in {args.output_dir}"
        print("\n" + closing_table(title, record.results, record.state, record.window, task.eval_name))
    return record.results


if __name__ == "__main__":
    common.run(main)
