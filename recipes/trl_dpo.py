"""Direct preference optimization with TRL's DPOTrainer and a compressed full-matrix optimizer.

Without arguments, offline, in minutes on two CPU cores: a small LLaMA from scratch first learns to write BBC News, by TRL's
SFTTrainer. Then it gets pairs: after three sentences of an article, the next one is better than a sentence of an article on
another topic. Both trainings take `--optim efcp_lowrank_mfac`. With arguments: any causal model of the hub, whole or with LoRA,
and a data set of preferences:

    python recipes/trl_dpo.py
    python recipes/trl_dpo.py --optim adamw_torch
    python recipes/trl_dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized \
        --use_peft --bf16 true --learning_rate 5e-5
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.hf_argparser import HfArg
from trl import DPOConfig, DPOTrainer, ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from hf_efcp.demo.bbc import bbc_news, split_sentences
from hf_efcp.demo.language import learn_tokenizer, small_llama
from hf_efcp.demo.running import costs, parse, summary
from hf_efcp.integrations.arguments import EFCPFields


@dataclass
class ModelArguments(ModelConfig):
    """TRL's own: which model, LoRA (--use_peft), --dtype."""

    model_name_or_path: str | None = HfArg(default=None, help="Model on the hub or local folder. Default: a new small LLaMA.")


@dataclass
class DataArguments:
    """What to train on."""

    dataset_name: str | None = HfArg(default=None, help="Data set on the hub, as TRL takes it. Default: BBC News, offline.")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration on the hub.")
    max_train_samples: int | None = HfArg(default=2000, help="Train on this many pairs.")
    max_eval_samples: int | None = HfArg(default=500, help="Evaluate on this many pairs.")
    read_steps: int = HfArg(default=400, help="A new model: steps of 8 texts in which it learns to write, before the pairs.")
    read_learning_rate: float = HfArg(default=3e-3, help="A new model: the highest learning rate of these steps.")


@dataclass
class TrainingArguments(EFCPFields, DPOConfig):
    """DPOTrainer's arguments and the optimizer's, with this recipe's defaults."""

    optim: str = HfArg(default="efcp_lowrank_mfac", help="The optimizer: hf_efcp's or any of transformers'.")
    output_dir: str | None = HfArg(default="outputs/trl_dpo", help="Folder for the results, the model and checkpoints.")
    learning_rate: float = HfArg(default=5e-4, help="The highest learning rate; 1e-5 or less suits a pretrained model.")
    max_length: int | None = HfArg(default=192, help="Longest prompt and completion in tokens; longer ones are cut.")
    per_device_train_batch_size: int = HfArg(default=8, help="Training batch size per device, in pairs.")
    per_device_eval_batch_size: int = HfArg(default=16, help="Evaluation batch size per device, in pairs.")
    num_train_epochs: float = HfArg(default=1.0, help="Number of passes over the training data.")
    logging_steps: float = HfArg(default=20, help="Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = HfArg(default="none", help="Integrations that get the logs, such as tensorboard or wandb.")
    bf16: bool | None = HfArg(default=False, help="Compute in bf16.")
    gradient_checkpointing: bool = HfArg(default=False, help="Compute activations twice, to save memory.")
    dataloader_pin_memory: bool = HfArg(default=torch.accelerator.is_available(), help="Pin memory; useless without a GPU.")


def preferences() -> DatasetDict:
    """Make pairs of BBC News: "prompt" is three sentences, "chosen" the next one, "rejected" one of another topic's article."""

    def pairs(rows: Dataset) -> Dataset:
        draw, found = random.Random(0), []
        articles = [(label, split_sentences(text)) for label, text in zip(rows["label"], rows["text"], strict=True)]
        for label, sentences in articles:
            for i in range(1, len(sentences) - 3, 2):
                other, others = label, []
                while other == label or len(others) < 2:
                    other, others = draw.choice(articles)
                rejected = draw.choice(others[1:])  # the first one has the headline
                prompt = " ".join(sentences[i : i + 3])
                found.append({"prompt": prompt, "chosen": f" {sentences[i + 3]}", "rejected": f" {rejected}"})
        return Dataset.from_list(found).shuffle(seed=0)

    return DatasetDict({split: pairs(rows) for split, rows in bbc_news().items()})


def read(pairs: Dataset, data: DataArguments, args: TrainingArguments) -> str:
    """Train a new LLaMA to write the prompts and the better answers; return its folder. A resumed run finds it there."""
    folder = Path(args.output_dir, "read")
    if not (args.resume_from_checkpoint and folder.is_dir()):
        texts = pairs.map(lambda row: {"text": row["prompt"] + row["chosen"]}, remove_columns=pairs.column_names)
        tokenizer = learn_tokenizer(texts["text"])
        settings = SFTConfig(
            output_dir=str(folder),
            optim=args.optim,
            optim_args=args.optim_args,
            learning_rate=data.read_learning_rate,
            max_steps=data.read_steps,
            max_length=args.max_length,
            logging_steps=args.logging_steps,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            use_cpu=args.use_cpu,
            bf16=args.bf16,
            gradient_checkpointing=False,
            dataloader_pin_memory=args.dataloader_pin_memory,
        )
        reader = SFTTrainer(model=small_llama(tokenizer), args=settings, train_dataset=texts, processing_class=tokenizer)
        if data.read_steps:
            reader.train()
        reader.save_model()
        reader.accelerator.wait_for_everyone()
    return str(folder)


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    ours, data, args = parse((ModelArguments, DataArguments, TrainingArguments), __doc__.split("\n")[0], argv)
    splits = load_dataset(data.dataset_name, data.dataset_config_name) if data.dataset_name else preferences()
    if "test" not in splits:
        splits = splits["train"].train_test_split(0.05, seed=0)
    train = splits["train"].select(range(min(len(splits["train"]), data.max_train_samples or len(splits["train"]))))
    evaluated = splits["test"].select(range(min(len(splits["test"]), data.max_eval_samples or len(splits["test"]))))
    set_seed(args.seed)  # new weights
    path = ours.model_name_or_path or read(splits["train"], data, args)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=ours.dtype or "float32")
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        peft_config=get_peft_config(ours),
    )
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    metrics |= {"train_samples": len(train), **costs(trainer.model, trainer.optimizer)}
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    found = trainer.evaluate() | {"eval_samples": len(evaluated)}
    trainer.log_metrics("eval", found)
    trainer.save_metrics("eval", found)
    results = metrics | found
    if trainer.is_world_process_zero():
        name = ours.model_name_or_path or "a new LLaMA"
        title = f"{args.optim.value}, {name} on {data.dataset_name or 'BBC News'}; files in {args.output_dir}"
        print("\n" + summary(title, results, "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"))
    return results


if __name__ == "__main__":
    main()
