"""Train a causal language model, all of it or LoRA adapters, with a compressed full-matrix optimizer.

Without arguments: a small LLaMA from scratch on BBC News with `--optim efcp_lowrank_mfac`, offline, in a few minutes on two
CPU cores; perplexity on held-out articles before and after. With arguments: any causal model and data set of the hub, or local
txt/csv/tsv/json/jsonl files:

    python recipes/causal_lm.py
    python recipes/causal_lm.py --optim adamw_torch
    python recipes/causal_lm.py --model_name_or_path meta-llama/Llama-3.2-1B --torch_dtype bfloat16 --lora --train_file notes.txt
    python recipes/causal_lm.py recipes/configs/llama_3.2_1b_lora_24gb.yaml
"""

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, default_data_collator, set_seed
from transformers.hf_argparser import HfArg

from hf_efcp import EFCPTrainingArguments, OptionError
from hf_efcp.demo.bbc import bbc_news
from hf_efcp.demo.language import learn_tokenizer, small_llama
from hf_efcp.demo.running import costs, parse, summary


@dataclass
class ModelArguments:
    """Which model to train, all of it or LoRA adapters."""

    model_name_or_path: str | None = HfArg(
        default=None, help="Model, or folder of a LoRA adapter, on the hub or local. Default: a new LLaMA of these sizes."
    )
    tokenizer_name: str | None = HfArg(
        default=None,
        help="Tokenizer name or folder, if it is not the model's. Default of a new model: byte-level BPE learned from the "
        "training texts; it knows no unknown words, so that perplexity counts every character.",
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] = HfArg(
        default="float32", help="Type of the weights. Small updates vanish in 16-bit weights; LoRA's stay in 32 bits."
    )
    hidden_size: int = HfArg(default=128, help="Width of a new model, a multiple of 64.")
    num_hidden_layers: int = HfArg(default=4, help="Depth of a new model.")
    vocab_size: int = HfArg(default=2048, help="Tokens of a new model's tokenizer.")
    lora: bool = HfArg(default=False, help="Train LoRA adapters instead of the whole model. Only these are saved.")
    lora_r: int = HfArg(default=8, help="Rank of the adapters.")
    lora_alpha: float = HfArg(default=16.0, help="Scale: the adapters' product is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before the adapters.")
    lora_target_modules: list[str] | None = HfArg(
        default=None, help="Names of the modules, such as q_proj v_proj. Default: every linear layer but the head."
    )


@dataclass
class DataArguments:
    """Which texts to train on."""

    dataset_name: str | None = HfArg(
        default=None, help="Data set on the hub, or bbc_articles or bbc_sentences (offline). Default: bbc_articles."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration on the hub.")
    topics: list[str] | None = HfArg(default=None, help="Only these topics of BBC News.")
    train_file: str | None = HfArg(
        default=None, help="Local training data: a .txt file, where an empty line ends a text, or .csv, .tsv, .json, .jsonl."
    )
    validation_file: str | None = HfArg(default=None, help="Local validation data.")
    validation_share: float = HfArg(default=0.05, help="Share of the texts to hold out where there is no validation data.")
    text_column: str | None = HfArg(default=None, help="Column of the texts. Default: text, or the only column.")
    block_size: int = HfArg(default=128, help="Length in tokens of the pieces that the texts, one after the other, are cut into.")
    separate_texts: bool = HfArg(
        default=True, help="End every text with the end-of-text token; false for rows that are lines of one long text."
    )
    max_train_samples: int | None = HfArg(default=None, help="Train on this many texts, drawn at random.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on this many texts, drawn at random.")
    split_seed: int = HfArg(default=0, help="Seed of the splits and of the draw of samples. --seed does not change them.")


@dataclass
class TrainingArguments(EFCPTrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train nor --do_eval: both."""

    output_dir: str | None = HfArg(default="outputs/causal_lm", help="Folder for the results, the model and checkpoints.")
    learning_rate: float | None = HfArg(
        default=None,
        help="The highest learning rate. Default: 1e-3 for a new model, 1e-4 for another, and 1 / hidden_size with LoRA.",
    )
    per_device_train_batch_size: int = HfArg(default=8, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Evaluation batch size per device.")
    num_train_epochs: float = HfArg(default=1.0, help="Number of passes over the training data.")
    logging_steps: float = HfArg(default=20, help="Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = HfArg(default="none", help="Integrations that get the logs, such as tensorboard or wandb.")
    dataloader_pin_memory: bool = HfArg(default=torch.accelerator.is_available(), help="Pin memory; useless without a GPU.")

    def __post_init__(self):
        """Train and evaluate where nothing is asked for; mark a learning rate that the model decides."""
        if not (self.do_train or self.do_eval):
            self.do_train = self.do_eval = True
        self.model_decides_rate = self.learning_rate is None
        if self.model_decides_rate:
            self.learning_rate = 1e-3
        super().__post_init__()


def load_texts(data: DataArguments) -> dict[str, Dataset]:
    """Load the splits "train" and "eval" as rows of "text", none of them empty."""
    name = data.dataset_name or "bbc_articles"
    if data.train_file and data.dataset_name:
        raise OptionError("--dataset_name and --train_file are both given: choose one")
    if data.topics and (data.train_file or name[:4] != "bbc_"):
        raise OptionError("--topics: only BBC News has topics")
    if data.train_file:
        kind = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}.get(Path(data.train_file).suffix)
        if kind is None:
            raise OptionError(f"--train_file {data.train_file!r}: the name must end in .txt, .csv, .tsv, .json or .jsonl")
        files = {"train": data.train_file, **({"validation": data.validation_file} if data.validation_file else {})}
        options = {"text": {"sample_by": "paragraph"}, "json": {}, "csv": {"keep_default_na": False}}[kind]
        options |= {"sep": "\t"} if data.train_file.endswith(".tsv") else {}
        splits = load_dataset(kind, data_files=files, **options)
    else:
        splits = bbc_news(name[4:], seed=data.split_seed) if name[:4] == "bbc_" else load_dataset(name, data.dataset_config_name)
    if data.topics:
        names = splits["train"].features["label"].names
        unknown = [topic for topic in data.topics if topic not in names]
        if unknown:
            raise OptionError(f"--topics {', '.join(unknown)}: BBC News has {', '.join(names)}")
        wanted = {names.index(topic) for topic in data.topics}
        splits = splits.filter(wanted.__contains__, input_columns="label")
    if len(splits) == 1:
        held_out = splits["train"].train_test_split(data.validation_share, seed=data.split_seed)
        splits = {"train": held_out["train"], "validation": held_out["test"]}
    found = {"train": splits["train"], "eval": splits["validation" if "validation" in splits else "test"]}
    for split, limit in (("train", data.max_train_samples), ("eval", data.max_eval_samples)):
        rows = found[split]
        columns = rows.column_names
        column = data.text_column or (columns[0] if len(columns) == 1 else "text")
        if column not in columns or "string" not in getattr(rows.features[column], "dtype", ""):
            raise OptionError(f"--text_column {column!r}: no column of texts; the data has {', '.join(columns)}")
        rows = rows.select_columns([column])
        rows = rows if column == "text" else rows.rename_column(column, "text")
        rows = rows.filter(lambda text: bool(text and text.strip()), input_columns="text")
        found[split] = rows if limit is None or limit >= len(rows) else rows.shuffle(seed=data.split_seed).select(range(limit))
    return found


def pack(rows: Dataset, tokenizer, block_size: int, separate_texts: bool = True) -> tuple[Dataset, float]:
    """Put the texts one after the other and cut them; return blocks of tokens, and the mean bytes that a token stands for."""
    end = [tokenizer.eos_token_id] if separate_texts and tokenizer.eos_token_id is not None else []

    def encode(batch):
        tokens = [ids + end * (ids[-1:] != end) for ids in tokenizer(batch["text"])["input_ids"]]
        return {"input_ids": tokens, "count": list(map(len, tokens)), "bytes": [len(text.encode()) for text in batch["text"]]}

    def cut(batch):
        tokens = list(itertools.chain.from_iterable(batch["input_ids"]))
        starts = range(0, len(tokens) - block_size + 1, block_size)
        blocks = [tokens[start : start + block_size] for start in starts]
        return {"input_ids": blocks, "labels": blocks}

    encoded = rows.map(encode, batched=True, remove_columns=["text"], desc="Tokenizing")
    blocks = encoded.map(cut, batched=True, remove_columns=encoded.column_names, desc="Packing")
    count = sum(encoded["count"])
    if not len(blocks):
        raise OptionError(f"--block_size {block_size}: the texts have {count} tokens, fewer than one block")
    return blocks, sum(encoded["bytes"]) / count


def load_model(ours: ModelArguments, tokenizer, block_size: int):
    """Make or load the model; with LoRA, a PeftModel of which only the adapters train."""
    source, dtype = ours.model_name_or_path, getattr(torch, ours.torch_dtype)
    if source is None:
        model = small_llama(tokenizer, ours.hidden_size, ours.num_hidden_layers, max(512, block_size)).to(dtype)
    elif os.path.isfile(os.path.join(source, "adapter_config.json")):
        return AutoPeftModelForCausalLM.from_pretrained(source, is_trainable=True, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    longest = getattr(model.config, "max_position_embeddings", None) or block_size
    if block_size > longest:
        raise OptionError(f"--block_size {block_size}: this model takes at most {longest}")
    if ours.lora:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=ours.lora_r,
            lora_alpha=ours.lora_alpha,
            lora_dropout=ours.lora_dropout,
            target_modules=ours.lora_target_modules or "all-linear",
        )
        model = get_peft_model(model, lora)
    return model


def usual_rate(model, new: bool) -> float:
    """Return the learning rate of a run that names none.

    Adapters bear a higher rate than whole models, and a lower one the wider the model: 8e-3 at width 128, 5e-4 at 2048.
    """
    if hasattr(model, "peft_config"):
        return 1 / model.config.get_text_config().hidden_size
    return 1e-3 if new else 1e-4


def held_out(metrics: dict, bytes_per_token: float) -> dict:
    """Return the metrics with perplexity, per token, and bits per byte, which can be compared between tokenizers."""
    loss = metrics["eval_loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return metrics | {"eval_perplexity": perplexity, "eval_bits_per_byte": loss / math.log(2) / bytes_per_token}


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    ours, data, args = parse((ModelArguments, DataArguments, TrainingArguments), __doc__.split("\n")[0], argv)
    with args.main_process_first(desc="tokenizing"):
        texts = load_texts(data)
        source = ours.tokenizer_name or ours.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(source) if source else learn_tokenizer(texts["train"]["text"], ours.vocab_size)
        train, _ = pack(texts["train"], tokenizer, data.block_size, data.separate_texts)
        evaluated, bytes_per_token = pack(texts["eval"], tokenizer, data.block_size, data.separate_texts)
    set_seed(args.seed)  # new weights
    model = load_model(ours, tokenizer, data.block_size)
    if args.model_decides_rate:
        args.learning_rate = usual_rate(model, new=ours.model_name_or_path is None)
    if args.gradient_checkpointing and hasattr(model, "peft_config"):
        model.enable_input_require_grads()  # else nothing before the first adapter would have a gradient
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    results = {}
    if args.do_train:
        before = held_out(trainer.evaluate(), bytes_per_token)["eval_perplexity"] if args.do_eval else None
        metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        metrics |= {"train_samples": len(train), **costs(model, trainer.optimizer)}
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        results |= metrics
    if args.do_eval:
        metrics = held_out(trainer.evaluate(), bytes_per_token) | {"eval_samples": len(evaluated)}
        if args.do_train:
            metrics["eval_perplexity_before"] = before
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results |= metrics
    if trainer.is_world_process_zero():
        name = data.dataset_name or data.train_file or "bbc_articles"
        kind = "LoRA, " if hasattr(model, "peft_config") else ""
        title = f"{args.optim.value} on {name}, {kind}{model.num_parameters() / 1e6:.1f}M parameters; files in {args.output_dir}"
        print("\n" + summary(title, results, "eval_perplexity_before", "eval_perplexity", "eval_bits_per_byte"))
    return results


if __name__ == "__main__":
    main()
