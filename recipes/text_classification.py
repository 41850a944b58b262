"""Fine-tune a text classifier with a compressed full-matrix optimizer.

Without arguments: the pretrained MiniLM-L6 BERT on BBC News (5 topics) with `--optim efcp_lowrank_mfac`, offline, in a few
minutes on two CPU cores. With arguments: any model and data set of the hub, or local csv/tsv/json/jsonl files:

    python recipes/text_classification.py
    python recipes/text_classification.py --model_name_or_path bert-base-uncased --dataset_name glue --dataset_config_name sst2
    python recipes/text_classification.py --train_file train.csv --validation_file dev.csv --optim_args rank=8,window_size=64
    python recipes/text_classification.py config.json
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import evaluate
import numpy as np
import torch
from bbc_news import UsageError
from classification import (
    check_arguments,
    closing_table,
    load_examples,
    load_model,
    load_tokenizer,
    option,
    parse,
    state_bytes,
    window_size,
)
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

import hf_efcp

ACCURACY = Path(__file__).resolve().parent / "metrics" / "accuracy"


@dataclasses.dataclass
class RecipeTrainingArguments(TrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train, --do_eval nor --do_predict: train and eval."""

    output_dir: str | None = option("outputs/text_classification", "Folder for the results, the model and checkpoints.")
    optim: OptimizerNames | str = dataclasses.field(
        default="efcp_lowrank_mfac", metadata={"help": "The optimizer: hf_efcp's or any of transformers'."}
    )
    learning_rate: float = option(1e-4, "The initial learning rate.")
    per_device_train_batch_size: int = option(16, "Training batch size per device.")
    per_device_eval_batch_size: int = option(32, "Evaluation batch size per device.")
    num_train_epochs: float = option(1.0, "Number of passes over the training data.")
    logging_steps: float = option(20, "Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = option("none", "Integrations that get the logs, such as tensorboard or wandb.")

    def __post_init__(self):
        """Default to training and evaluation; no pinned memory, and no warning about it, on a CPU."""
        chosen = self.do_train or self.do_eval or self.do_predict
        super().__post_init__()
        if not chosen:
            self.do_train = self.do_eval = True
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


class _StepTimer(TrainerCallback):
    """Milliseconds of every training step (forward, backward, optimizer), without data loading, logging and saving."""

    def __init__(self):
        self.milliseconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.milliseconds.append(1000 * (time.perf_counter() - self._start))


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; returns what all_results.json gets.

    Raises:
        UsageError: a mistake in the arguments or the data; nothing was trained or written.
    """
    model_args, data, args = parse(RecipeTrainingArguments, __doc__, sys.argv[1:] if argv is None else argv)
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

    timer = _StepTimer()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=examples["train"],
        eval_dataset=examples["eval"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: accuracy.compute(predictions=classes(p.predictions), references=p.label_ids),
        callbacks=[timer],
    )
    results, state, window = {}, {}, None

    def keep(split: str, metrics: dict) -> None:
        metrics[f"{split}_samples"] = len(examples[split])
        results.update(metrics)
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)

    if args.do_train:
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        state, window = state_bytes(optimizer), window_size(optimizer)
        metrics |= {"train_steps": len(timer.milliseconds), "train_parameters": parameters}
        metrics |= {"train_optimizer_state_bytes": sum(state.values())}
        if timer.milliseconds:  # none where the run to resume was finished
            metrics["train_ms_per_step"] = statistics.median(timer.milliseconds)
        trainer.save_model()
        trainer.save_state()
        keep("train", metrics)
    if args.do_eval:
        for split in task.labelled:
            keep(split, trainer.evaluate(examples[split], metric_key_prefix=split))
    if args.do_predict:
        predicted = classes(trainer.predict(examples.get("test", examples["eval"])).predictions)
        if trainer.is_world_process_zero():
            Dataset.from_dict({"prediction": [task.names[i] for i in predicted]}).to_csv(Path(args.output_dir, "predictions.csv"))
    if trainer.is_world_process_zero():
        title = f"{args.optim.value} on {task.title}; files in {args.output_dir}"
        print("\n" + closing_table(title, results, state, window, task.eval_name))
    return results


if __name__ == "__main__":
    try:
        main()
    except (UsageError, hf_efcp.OptionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
