"""Train an image classifier with a compressed full-matrix optimizer.

Without arguments: a small vision transformer from scratch on scikit-learn's digits (1797 images of 8 x 8 pixels) with
`--optim efcp_lowrank_mfac`, offline, in about a minute on two CPU cores. With arguments: a model and a data set of the hub:

    python recipes/image_classification.py
    python recipes/image_classification.py --model resnet
    python recipes/image_classification.py --optim adamw_torch
    python recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_efcp import EFCPTrainingArguments, OptionError
from hf_efcp.demo.running import costs, parse, summary


@dataclass
class Arguments:
    """Which model to train on which images."""

    model: Literal["vit", "resnet"] = HfArg(default="vit", help="The new model for the digits.")
    model_name_or_path: str | None = HfArg(default=None, help="Model on the hub or local folder, to fine-tune.")
    dataset_name: str | None = HfArg(default=None, help="Data set on the hub or local folder. Default: scikit-learn's digits.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many images, drawn at random.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on this many images, drawn at random.")
    split_seed: int = HfArg(default=0, help="Seed of the digits' split and of the draw of samples. --seed does not change them.")


@dataclass
class TrainingArguments(EFCPTrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train nor --do_eval: both."""

    output_dir: str | None = HfArg(default="outputs/image_classification", help="Folder for results, model and checkpoints.")
    learning_rate: float = HfArg(default=1e-3, help="The highest learning rate; 1e-4 suits a pretrained model.")
    warmup_steps: float = HfArg(default=30, help="Steps over which the learning rate rises from 0.")
    per_device_train_batch_size: int = HfArg(default=64, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Evaluation batch size per device.")
    num_train_epochs: float = HfArg(default=15.0, help="Number of passes over the training data.")
    logging_steps: float = HfArg(default=20, help="Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = HfArg(default="none", help="Integrations that get the logs, such as tensorboard or wandb.")
    remove_unused_columns: bool = HfArg(default=False, help="The image column is read when a batch is made.")
    dataloader_pin_memory: bool = HfArg(default=torch.accelerator.is_available(), help="Pin memory; useless without a GPU.")

    def __post_init__(self):
        """Train and evaluate where nothing is asked for."""
        if not (self.do_train or self.do_eval):
            self.do_train = self.do_eval = True
        super().__post_init__()


def digits(seed: int, scale: int) -> tuple[Dataset, Dataset]:
    """Load the digits, 80% to train on and 20% to evaluate on; every pixel becomes `scale` x `scale` pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise OptionError("the digits need scikit-learn: pip install scikit-learn; or give --dataset_name") from None
    data = load_digits()
    pixels = np.kron(data.images[:, None] / 16, np.ones((1, 1, scale, scale))).astype(np.float32)
    rows = Dataset.from_dict({"pixel_values": pixels, "labels": data.target}).with_format("torch")
    splits = rows.train_test_split(0.2, seed=seed)
    return splits["train"], splits["test"]


def new_model(kind: str) -> torch.nn.Module:
    """Make a small model for the digits: a vision transformer over patches of 2 x 2, or a ResNet of three stages."""
    if kind == "resnet":
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **sizes))
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes, **dropout))


def hub_images(name: str, processor) -> tuple[Dataset, Dataset, list[str]]:
    """Load a data set with a column of images and one of classes; return train split, split to evaluate on, class names."""
    data = load_dataset(name)
    features = data["train"].features
    image = next((column for column, feature in features.items() if isinstance(feature, Image)), None)
    label = next((column for column, feature in features.items() if isinstance(feature, ClassLabel)), None)
    if image is None or label is None:
        raise OptionError(f"--dataset_name {name!r}: needs a column of images and one of classes, has {features}")

    def encode(batch):
        pixels = processor([picture.convert("RGB") for picture in batch[image]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(batch[label])}

    evaluated = next((split for split in ("validation", "test") if split in data), None)
    if evaluated is None:
        data = data["train"].train_test_split(0.1, seed=0)
        evaluated = "test"
    return data["train"].with_transform(encode), data[evaluated].with_transform(encode), features[label].names


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    ours, args = parse((Arguments, TrainingArguments), __doc__.split("\n")[0], argv)
    if bool(ours.dataset_name) != bool(ours.model_name_or_path):
        raise OptionError("--dataset_name and --model_name_or_path: give both or neither")
    if ours.dataset_name:
        processor = AutoImageProcessor.from_pretrained(ours.model_name_or_path)
        train, evaluated, names = hub_images(ours.dataset_name, processor)
    else:
        processor = None
        train, evaluated = digits(ours.split_seed, scale=4 if ours.model == "resnet" else 1)  # a ResNet halves images 4 times
    if ours.max_train_samples is not None:
        train = train.shuffle(seed=ours.split_seed).select(range(min(len(train), ours.max_train_samples)))
    if ours.max_eval_samples is not None:
        evaluated = evaluated.shuffle(seed=ours.split_seed).select(range(min(len(evaluated), ours.max_eval_samples)))
    set_seed(args.seed)  # new weights
    if ours.model_name_or_path:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
        model = AutoModelForImageClassification.from_pretrained(
            ours.model_name_or_path, **labels, dtype="float32", ignore_mismatched_sizes=True
        )
    else:
        model = new_model(ours.model)
    # Its loss is a batch mean. Unless told, Trainer takes it for a sum: N processes or accumulation steps would give N times it.
    model.accepts_loss_kwargs = False

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=processor,
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
        metrics = trainer.evaluate() | {"eval_samples": len(evaluated)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results |= metrics
    if trainer.is_world_process_zero():
        title = f"{args.optim.value}, {ours.model_name_or_path or ours.model} on {ours.dataset_name or 'digits'}"
        print("\n" + summary(f"{title}; files in {args.output_dir}", results, "eval_accuracy", "eval_loss"))
    return results


if __name__ == "__main__":
    main()
