"""Direct preference optimization with TRL's DPOTrainer and a compressed full-matrix optimizer.

Without arguments: a small LLaMA from scratch gets pairs of BBC News, the next sentence of an article and one of an article on
another topic, with `--optim efcp_lowrank_mfac`, offline, in a few minutes on two CPU cores. A model that has read nothing stays
at chance: this shows that everything works. One that causal_lm.py has trained learns a little. With arguments: any causal model
of the hub, whole or with LoRA, and a data set of preferences:

    python recipes/trl_dpo.py
    python recipes/trl_dpo.py --optim adamw_torch
    python recipes/trl_dpo.py --model_name_or_path outputs/causal_lm --learning_rate 3e-4
    python recipes/trl_dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized \
        --use_peft --bf16 true --learning_rate 5e-5
"""

import random
from dataclasses import dataclass

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.hf_argparser import HfArg
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

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


@dataclass
class TrainingArguments(EFCPFields, DPOConfig):
    """DPOTrainer's arguments and the optimizer's, with this recipe's defaults."""

    optim: str = HfArg(default="efcp_lowrank_mfac", help="The optimizer: hf_efcp's or any of transformers'.")
    output_dir: str | None = HfArg(default="outputs/trl_dpo", help="Folder for the results, the model and checkpoints.")
    learning_rate: float = HfArg(default=1e-3, help="The highest learning rate; 1e-5 or less suits a pretrained model.")
    max_length: int | None = HfArg(default=128, help="Longest prompt and completion in tokens; longer ones are cut.")
    per_device_train_batch_size: int = HfArg(default=8, help="Training batch size per device, in pairs.")
    per_device_eval_batch_size: int = HfArg(default=16, help="Evaluation batch size per device, in pairs.")
    num_train_epochs: float = HfArg(default=1.0, help="Number of passes over the training data.")
    logging_steps: float = HfArg(default=20, help="Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = HfArg(default="none", help="Integrations that get the logs, such as tensorboard or wandb.")
    bf16: bool | None = HfArg(default=False, help="Compute in bf16.")
    gradient_checkpointing: bool = HfArg(default=False, help="Compute activations twice, to save memory.")
    dataloader_pin_memory: bool = HfArg(default=torch.accelerator.is_available(), help="Pin memory; useless without a GPU.")


def preferences() -> DatasetDict:
    """Make pairs of BBC News: "prompt" is a sentence, "chosen" the next one, "rejected" one of an article on another topic."""

    def pairs(rows: Dataset) -> Dataset:
        draw, found = random.Random(0), []
        articles = [(label, split_sentences(text)) for label, text in zip(rows["label"], rows["text"], strict=True)]
        for label, sentences in articles:
            for i in range(1, len(sentences) - 1, 2):
                other, others = label, []
                while other == label or len(others) < 2:
                    other, others = draw.choice(articles)
                rejected = draw.choice(others[1:])  # the first one has the headline
                found.append({"prompt": sentences[i], "chosen": f" {sentences[i + 1]}", "rejected": f" {rejected}"})
        return Dataset.from_list(found).shuffle(seed=0)

    return DatasetDict({split: pairs(rows) for split, rows in bbc_news().items()})


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    ours, data, args = parse((ModelArguments, DataArguments, TrainingArguments), __doc__.split("\n")[0], argv)
    splits = load_dataset(data.dataset_name, data.dataset_config_name) if data.dataset_name else preferences()
    if "test" not in splits:
        splits = splits["train"].train_test_split(0.05, seed=0)
    train = splits["train"].select(range(min(len(splits["train"]), data.max_train_samples or len(splits["train"]))))
    evaluated = splits["test"].select(range(min(len(splits["test"]), data.max_eval_samples or len(splits["test"]))))
    set_seed(args.seed)  # new weights
    if ours.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(ours.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(ours.model_name_or_path, dtype=ours.dtype or "float32")
        reference = None  # TRL loads the model once more, or switches the adapters off
    else:
        tokenizer = learn_tokenizer([row["prompt"] + row["chosen"] for row in train])
        model, reference = small_llama(tokenizer), small_llama(tokenizer)
        reference.load_state_dict(model.state_dict())
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
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
