"""Train softmax regression on the frozen features of a pretrained model with a compressed full-matrix optimizer.

The problem is convex and small (1,925 parameters at the default), and its matrix is ill-conditioned: the case for a second-order
method, with nothing to tune but the learning rate. Without arguments: MiniLM-L6's mean token of single BBC News sentences (5
topics) with `--optim efcp_lowrank_mfac`, offline. With arguments: any encoder and data set of the hub:

    python recipes/linear_probe.py
    python recipes/linear_probe.py --optim adamw_torch
    python recipes/linear_probe.py --model_name_or_path bert-base-uncased --dataset_name ag_news
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from transformers import AutoModel, AutoTokenizer, Trainer, default_data_collator, set_seed
from transformers.hf_argparser import HfArg

from hf_efcp import EFCPTrainingArguments, OptionError
from hf_efcp.demo.bbc import bbc_news, minilm_folder
from hf_efcp.demo.running import costs, parse, summary


@dataclass
class Arguments:
    """Whose features to classify, of which texts."""

    model_name_or_path: str | None = HfArg(default=None, help="Encoder on the hub or local folder. Default: MiniLM-L6 BERT.")
    dataset_name: str = HfArg(default="bbc_sentences", help="Data set on the hub, or bbc_articles or bbc_sentences (offline).")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration on the hub.")
    train_file: str | None = HfArg(default=None, help="Local training data: a .csv file.")
    validation_file: str | None = HfArg(default=None, help="Local validation data, needed beside --train_file.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    label_column: str = HfArg(default="label", help="Column of the classes.")
    max_seq_length: int = HfArg(default=32, help="Longest text in tokens; longer ones are cut.")
    max_train_samples: int = HfArg(default=3000, help="Train on at most this many texts, drawn at random.")
    max_eval_samples: int = HfArg(default=3000, help="Evaluate on at most this many texts, drawn at random.")
    split_seed: int = HfArg(default=0, help="Seed of BBC News's split and of the draw of samples. --seed does not change them.")


@dataclass
class TrainingArguments(EFCPTrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train nor --do_eval: both."""

    output_dir: str | None = HfArg(default="outputs/linear_probe", help="Folder for the results, the model and checkpoints.")
    learning_rate: float = HfArg(default=1e-3, help="The highest learning rate.")
    per_device_train_batch_size: int = HfArg(default=64, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Evaluation batch size per device, of the encoder too.")
    num_train_epochs: float = HfArg(default=10.0, help="Number of passes over the training data.")
    logging_steps: float = HfArg(default=50, help="Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = HfArg(default="none", help="Integrations that get the logs, such as tensorboard or wandb.")
    dataloader_pin_memory: bool = HfArg(default=torch.accelerator.is_available(), help="Pin memory; useless without a GPU.")

    def __post_init__(self):
        """Train and evaluate where nothing is asked for."""
        if not (self.do_train or self.do_eval):
            self.do_train = self.do_eval = True
        super().__post_init__()


class Probe(torch.nn.Module):
    """Softmax regression, which starts at zero: every class has the same probability."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.linear = torch.nn.Linear(inputs, classes)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Compute logits, and the loss where there are labels."""
        logits = self.linear(features)
        loss = {} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


@torch.no_grad()
def features_of(texts: list[str], encoder, tokenizer, ours: Arguments, batch_size: int, device: torch.device) -> np.ndarray:
    """Return the mean of every text's token vectors, (texts, hidden)."""
    found = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size], truncation=True, max_length=ours.max_seq_length, padding=True, return_tensors="pt"
        ).to(device)
        mask = batch["attention_mask"][..., None]
        states = encoder(**batch).last_hidden_state
        found.append(((states * mask).sum(1) / mask.sum(1)).float().cpu())
    return torch.cat(found).numpy()


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    ours, args = parse((Arguments, TrainingArguments), __doc__.split("\n")[0], argv)
    source, name = ours.model_name_or_path or minilm_folder(), ours.dataset_name
    if ours.train_file:
        data = load_dataset("csv", data_files={"train": ours.train_file, "validation": ours.validation_file})
        data = data.class_encode_column(ours.label_column)
    elif name[:4] == "bbc_":
        data = bbc_news(name[4:], seed=ours.split_seed)
    else:
        data = load_dataset(name, ours.dataset_config_name)
    if not isinstance(data["train"].features.get(ours.label_column), ClassLabel):
        raise OptionError(f"--label_column {ours.label_column!r}: no column of classes; the data has {data['train'].features}")
    evaluated = "validation" if "validation" in data else "test"

    tokenizer, encoder = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).to(args.device).eval()
    if tokenizer.pad_token is None:  # most decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    splits = []
    for split, limit in (("train", ours.max_train_samples), (evaluated, ours.max_eval_samples)):
        rows = data[split].shuffle(seed=ours.split_seed).select(range(min(limit, len(data[split]))))
        texts = list(rows[ours.text_column])
        features = features_of(texts, encoder, tokenizer, ours, args.per_device_eval_batch_size, args.device)
        splits.append((features, rows[ours.label_column]))
    mean, deviation = splits[0][0].mean(0), splits[0][0].std(0) + 1e-6  # of the train split, for both
    train, held_out = (
        Dataset.from_dict({"features": (features - mean) / deviation, "labels": labels}).with_format("torch")
        for features, labels in splits
    )

    set_seed(args.seed)  # the order of the examples
    model = Probe(len(mean), data["train"].features[ours.label_column].num_classes)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
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
    if trainer.is_world_process_zero():
        title = f"{args.optim.value}, softmax regression on {ours.train_file or name}; files in {args.output_dir}"
        print("\n" + summary(title, results, "eval_accuracy", "eval_loss"))
    return results


if __name__ == "__main__":
    main()
