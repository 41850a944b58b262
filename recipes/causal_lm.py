"""Train a causal language model, all of it or LoRA adapters, with a compressed full-matrix optimizer.

Without arguments: a small LLaMA from scratch on BBC News with `--optim efcp_lowrank_mfac`, offline, in a few minutes on two
CPU cores; perplexity on held-out articles before and after. With arguments: any causal model and data set of the hub, or local
txt/csv/tsv/json/jsonl files:

    python recipes/causal_lm.py
    python recipes/causal_lm.py --model_name_or_path meta-llama/Llama-3.2-1B --torch_dtype bfloat16 --lora --train_file notes.txt
    python recipes/causal_lm.py config.json
"""

import dataclasses
import itertools
import math

import common
import torch
from bbc_news import TASKS, TEXT_FILE_KINDS, UsageError, load_splits
from common import cost_rows, option
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    default_data_collator,
    set_seed,
)
from transformers.utils.peft_utils import find_adapter_config_file

DTYPES = ("float32", "bfloat16", "float16")
HEAD_DIM = 32
BBC = [f"bbc_{task}" for task in TASKS]


@dataclasses.dataclass
class ModelArguments(common.ModelArguments):
    """Which model to train."""

    model_name_or_path: str | None = option(
        None, "Model, or LoRA adapter, on the hub or local folder. Default: a new LLaMA of the sizes below."
    )
    tokenizer_name: str | None = option(
        None,
        "Tokenizer name or folder, if it is not the model's. Default of a new model: byte-level BPE learned from the training "
        "texts; it loses nothing and knows no unknown words, so that perplexity counts every character.",
    )
    torch_dtype: str = option(
        "float32", f"Type of the weights: {', '.join(DTYPES)}. Small updates vanish in 16-bit weights; LoRA's stay in 32 bits."
    )
    hidden_size: int = option(128, f"Width of a new model, a multiple of {2 * HEAD_DIM}: two query heads share a key.")
    num_hidden_layers: int = option(4, "Depth of a new model.")
    vocab_size: int = option(2048, "Tokens of a new model's tokenizer.")


@dataclasses.dataclass
class LoraArguments:
    """LoRA: train low-rank additions to frozen matrices. Only these are saved."""

    lora: bool = option(False, "Train LoRA adapters instead of the whole model.")
    lora_r: int = option(8, "Rank of the adapters.")
    lora_alpha: float = option(16.0, "Scale: the adapters' product is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Names of the modules, such as q_proj v_proj. Default: every linear layer but the head."}
    )


@dataclasses.dataclass
class DataArguments(common.DataArguments):
    """Which texts to train on."""

    dataset_name: str | None = option(
        None, "Data set on the hub, or bbc_articles or bbc_sentences (offline). Default: bbc_articles."
    )
    topics: list[str] | None = dataclasses.field(default=None, metadata={"help": "Only these topics of BBC News."})
    train_file: str | None = option(
        None, "Local training data: a .txt file, where an empty line ends a text, or a .csv, .tsv, .json or .jsonl file."
    )
    validation_file: str | None = option(None, "Local validation data.")
    validation_share: float = option(0.05, "Share of the training texts to hold out where there is no validation data.")
    text_column: str | None = option(None, "Column of the texts. Default: text, or the only column.")
    block_size: int = option(128, "Length in tokens of the pieces that the texts, one after the other, are cut into.")
    separate_texts: bool = option(
        True, "End every text with the end-of-text token; false for rows that are lines of one long text, as in wikitext."
    )


@dataclasses.dataclass
class RecipeTrainingArguments(common.CommonTrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train nor --do_eval: both."""

    output_dir: str | None = option("outputs/causal_lm", "Folder for the results, the model and checkpoints.")
    per_device_train_batch_size: int = option(8, "Training batch size per device.")
    learning_rate: float | None = option(None, "The initial learning rate. Default: 1e-3 for new models and LoRA, else 1e-4.")

    def __post_init__(self):
        """Mark a learning rate that is to be chosen with the model."""
        self.choose_learning_rate = self.learning_rate is None
        if self.choose_learning_rate:
            self.learning_rate = 1e-4
        super().__post_init__()


def check_arguments(model: ModelArguments, lora: LoraArguments, data: DataArguments, args) -> dict[str, str]:
    """The local files by split; raises UsageError for what is wrong before anything is loaded."""
    files = common.check_files(data, TEXT_FILE_KINDS, needed={"train"})
    common.check_integers(data, block_size=2)
    common.check_integers(model, hidden_size=1, num_hidden_layers=1, vocab_size=258)
    common.check_integers(lora, lora_r=1)
    common.check_resume(args)
    for arguments, name, holds, allowed in (
        (model, "torch_dtype", DTYPES.__contains__, f"one of {', '.join(DTYPES)}"),
        (model, "hidden_size", lambda x: x % (2 * HEAD_DIM) == 0, f"a multiple of {2 * HEAD_DIM}"),
        (lora, "lora_alpha", lambda x: x > 0, "a number > 0"),
        (lora, "lora_dropout", lambda x: 0 <= x < 1, "a number in [0, 1)"),
        (data, "validation_share", lambda x: 0 < x < 1, "a number between 0 and 1"),
        (args, "do_predict", lambda x: not x, "false: there is nothing to predict"),
    ):
        common.check(arguments, name, holds, allowed)
    if data.topics and (files or (data.dataset_name or BBC[0]) not in BBC):
        raise UsageError("--topics: only BBC News has topics")
    if args.choose_learning_rate and (lora.lora or not model.model_name_or_path):
        args.learning_rate = 1e-3
    common.check_schedule(args)
    return files


# Data ---------------------------------------------------------------------------------------------------------------------


def load_texts(dataset: str | None, files: dict[str, str], data: DataArguments) -> tuple[dict[str, Dataset], str]:
    """The splits "train" and "eval" as rows of "text", none of them empty, and the own name of "eval"."""
    splits, eval_name = load_splits(dataset, data.dataset_config_name, files, data.split_seed, data.validation_share)
    splits = {split: splits[split] for split in ("train", "eval")}
    if data.topics:
        names = splits["train"].features["label"].names
        topics = common.words(data.topics)
        unknown = [topic for topic in topics if topic not in names]
        if unknown:
            raise UsageError(f"--topics {', '.join(unknown)}: BBC News has {', '.join(names)}")
        wanted = {names.index(topic) for topic in topics}
        splits = {split: rows.filter(wanted.__contains__, input_columns="label") for split, rows in splits.items()}
    columns = splits["train"].column_names
    column = data.text_column or (columns[0] if len(columns) == 1 else "text")
    for split, rows in splits.items():
        kind = getattr(rows.features.get(column), "dtype", None)
        if kind not in ("string", "large_string"):
            found = f"holds {kind}, not text" if kind else f"no such column; the data has {', '.join(rows.column_names)}"
            raise UsageError(f"--text_column {column!r} of the {split} split: {found}")
        rows = rows.select_columns([column])
        rows = rows if column == "text" else rows.rename_column(column, "text")
        rows = rows.filter(lambda text: bool(text and text.strip()), input_columns="text")
        if not len(rows):
            raise UsageError(f"the {split} split has no texts")
        splits[split] = data.sample(split, rows)
    return splits, eval_name


def learn_tokenizer(texts: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text comes back from its tokens unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((batch["text"] for batch in texts.iter(1000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def pack(split: str, rows: Dataset, tokenizer, data: DataArguments) -> tuple[Dataset, float]:
    """Blocks of tokens, with the texts one after the other; and the mean number of bytes that a token stands for."""
    end = [tokenizer.eos_token_id] if data.separate_texts and tokenizer.eos_token_id is not None else []

    def encode(batch):
        tokens = [ids + end * (ids[-1:] != end) for ids in tokenizer(batch["text"])["input_ids"]]
        return {"input_ids": tokens, "count": list(map(len, tokens)), "bytes": [len(text.encode()) for text in batch["text"]]}

    def cut(batch):
        tokens = list(itertools.chain.from_iterable(batch["input_ids"]))
        starts = range(0, len(tokens) - data.block_size + 1, data.block_size)
        blocks = [tokens[start : start + data.block_size] for start in starts]
        return {"input_ids": blocks, "labels": blocks}

    encoded = rows.map(encode, batched=True, remove_columns=["text"], desc=f"Tokenizing {split}")
    blocks = encoded.map(cut, batched=True, remove_columns=encoded.column_names, desc=f"Packing {split}")
    count = sum(encoded["count"])
    if not len(blocks):
        raise UsageError(f"the {split} split has {count} tokens, fewer than one block: --block_size {data.block_size}")
    return blocks, sum(encoded["bytes"]) / count


# Model --------------------------------------------------------------------------------------------------------------------


def load_configuration(args: ModelArguments, block_size: int):
    """(configuration, tokenizer, adapter), as far as they are not made here: each may be None."""
    source = args.model_name_or_path
    config = tokenizer = adapter = None
    try:
        if source and find_adapter_config_file(source, revision=args.model_revision):
            adapter = PeftConfig.from_pretrained(source, revision=args.model_revision)
            base = {"trust_remote_code": args.trust_remote_code}  # the revision is the adapter's
            config = AutoConfig.from_pretrained(adapter.base_model_name_or_path, **base)
        elif source:
            config = AutoConfig.from_pretrained(source, **args.hub)
        if source or args.tokenizer_name:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or source, **args.hub)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model_name_or_path {source!r}, --tokenizer_name {args.tokenizer_name!r}: {error}") from None
    limit = getattr(config, "max_position_embeddings", None) or block_size
    if block_size > limit:
        raise UsageError(f"--block_size {block_size}: this model takes at most {limit}")
    return config, tokenizer, adapter


def load_model(args: ModelArguments, lora: LoraArguments, config, tokenizer, adapter, data: DataArguments):
    """The model, new or pretrained, in the wanted type; with LoRA, a PeftModel of which only the adapters train."""
    dtype = getattr(torch, args.torch_dtype)
    if config is None:
        heads = args.hidden_size // HEAD_DIM
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=round(args.hidden_size * 8 / 3 / HEAD_DIM) * HEAD_DIM,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=max(512, data.block_size),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    else:
        try:
            source = adapter.base_model_name_or_path if adapter else args.model_name_or_path
            hub = {"trust_remote_code": args.trust_remote_code} if adapter else args.hub
            model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **hub)
        except (OSError, ValueError) as error:
            raise UsageError(f"--model_name_or_path {args.model_name_or_path!r}: {error}") from None
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise UsageError(f"--tokenizer_name: {len(tokenizer)} tokens, more than the model's {config.vocab_size}")
    if adapter:
        return PeftModel.from_pretrained(model, args.model_name_or_path, is_trainable=True, revision=args.model_revision)
    if lora.lora:
        targets = common.words(lora.lora_target_modules)
        lora_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=targets if targets and targets != ["all-linear"] else "all-linear",
        )
        try:
            return get_peft_model(model, lora_config)
        except ValueError as error:
            raise UsageError(f"--lora_target_modules: {error}") from None
    return model


# Run ----------------------------------------------------------------------------------------------------------------------


def held_out(metrics: dict, bytes_per_token: float) -> dict:
    """Evaluation metrics with perplexity, per token, and bits per byte, which does not depend on the tokenizer."""
    loss = metrics["eval_loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return metrics | {"eval_perplexity": perplexity, "eval_bits_per_byte": loss / math.log(2) / bytes_per_token}


def closing_table(title: str, results: dict, state: dict[str, int], window: int | None, eval_name: str) -> str:
    """Perplexity, then what the run cost: see `cost_rows`."""
    rows = []
    for key, when in (("eval_perplexity_before", " before"), ("eval_perplexity", "")):
        if key in results:
            rows.append((f"{eval_name} perplexity{when}", f"{results[key]:.2f}", "per token"))
    if "eval_bits_per_byte" in results:
        rows.append((f"{eval_name} bits per byte", f"{results['eval_bits_per_byte']:.3f}", f"{results['eval_samples']} blocks"))
    return common.table(title, rows + cost_rows(results, state, window))


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; returns what all_results.json gets.

    Raises:
        UsageError: a mistake in the arguments or the data; nothing was trained or written.
    """
    groups = (ModelArguments, LoraArguments, DataArguments, RecipeTrainingArguments)
    model_args, lora, data, args = common.parse(groups, __doc__.split("\n")[0], argv)
    files = check_arguments(model_args, lora, data, args)
    config, tokenizer, adapter = load_configuration(model_args, data.block_size)
    dataset = data.dataset_name or (None if files else BBC[0])
    with args.main_process_first(desc="reading and tokenizing the data"):
        texts, eval_name = load_texts(dataset, files, data)
        tokenizer = tokenizer or learn_tokenizer(texts["train"], model_args.vocab_size)
        blocks, bytes_per_token = {}, {}
        for split, rows in texts.items():
            blocks[split], bytes_per_token[split] = pack(split, rows, tokenizer, data)
    set_seed(args.seed)  # new weights
    model = load_model(model_args, lora, config, tokenizer, adapter, data)
    if args.gradient_checkpointing and hasattr(model, "peft_config"):
        model.enable_input_require_grads()  # else nothing before the first adapter would have a gradient
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["eval"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    record = common.Record(trainer)
    if args.do_eval:
        metrics = held_out(trainer.evaluate(), bytes_per_token["eval"])
    if args.do_train:
        record.train()
    if args.do_eval:
        if args.do_train:
            before = metrics["eval_perplexity"]
            metrics = held_out(trainer.evaluate(), bytes_per_token["eval"]) | {"eval_perplexity_before": before}
        record.keep("eval", metrics, len(blocks["eval"]))
    if trainer.is_world_process_zero():
        kind = "LoRA, " if hasattr(model, "peft_config") else ""
        title = f"{args.optim.value} on {dataset or data.train_file}, {kind}{model.num_parameters() / 1e6:.1f}M parameters"
        title += f"; files in {args.output_dir}"
        print("\n" + closing_table(title, record.results, record.state, record.window, eval_name))
    return record.results


if __name__ == "__main__":
    common.run(main)
