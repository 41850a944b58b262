"""Train a sequence-to-sequence model with Seq2SeqTrainer and a compressed full-matrix optimizer.

Without arguments: a small T5 from scratch writes the headlines of BBC News articles from their first sentences, with `--optim
efcp_lowrank_mfac`, offline, in a few minutes on two CPU cores. 1,700 articles are far too few to learn to write from nothing: the
loss falls, and what it writes has the words that most headlines have. With arguments: a pretrained model and a data set of the
hub, where the same file makes summaries:

    python recipes/summarization.py
    python recipes/summarization.py --optim adamw_torch
    python recipes/summarization.py --model_name_or_path google-t5/t5-small --dataset_name EdinburghNLP/xsum \
        --text_column document --summary_column summary --source_prefix "summarize: " --max_source_length 512 --learning_rate 1e-4
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_efcp.demo.bbc import bbc_news, read_articles
from hf_efcp.demo.language import learn_tokenizer
from hf_efcp.demo.running import costs, parse, summary
from hf_efcp.integrations.arguments import EFCPFields


@dataclass
class Arguments:
    """Which model to train on which texts and summaries."""

    model_name_or_path: str | None = HfArg(default=None, help="Model on the hub or local folder. Default: a new small T5.")
    dataset_name: str | None = HfArg(default=None, help="Data set on the hub. Default: headlines of BBC News, offline.")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration on the hub.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    summary_column: str = HfArg(default="summary", help="Column of the summaries.")
    source_prefix: str = HfArg(default="", help="Put before every text, such as 'summarize: ' for T5.")
    max_source_length: int = HfArg(default=96, help="Longest text in tokens; longer ones are cut.")
    max_target_length: int = HfArg(default=24, help="Longest summary in tokens; longer ones are cut.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many examples.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on this many examples.")


@dataclass
class TrainingArguments(EFCPFields, Seq2SeqTrainingArguments):
    """Seq2SeqTrainer's arguments and the optimizer's, with this recipe's defaults."""

    optim: str = HfArg(default="efcp_lowrank_mfac", help="The optimizer: hf_efcp's or any of transformers'.")
    output_dir: str | None = HfArg(default="outputs/summarization", help="Folder for the results, the model and checkpoints.")
    learning_rate: float = HfArg(default=1e-3, help="The highest learning rate; 1e-4 suits a pretrained model.")
    per_device_train_batch_size: int = HfArg(default=16, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Evaluation batch size per device.")
    num_train_epochs: float = HfArg(default=4.0, help="Number of passes over the training data.")
    logging_steps: float = HfArg(default=20, help="Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = HfArg(default="none", help="Integrations that get the logs, such as tensorboard or wandb.")
    predict_with_generate: bool = HfArg(default=True, help="Evaluate what the model writes, not only the loss.")
    dataloader_pin_memory: bool = HfArg(default=torch.accelerator.is_available(), help="Pin memory; useless without a GPU.")


def headlines() -> DatasetDict:
    """Make pairs of BBC News: an article without its first line as "text", the first line as "summary"."""
    whole = {article["article"]: article["text"].strip().partition("\n") for article in read_articles()}

    def pairs(rows: Dataset) -> Dataset:
        found = [whole[article] for article in rows["article"]]
        return Dataset.from_list([{"text": " ".join(body.split()), "summary": title.strip()} for title, _, body in found])

    return DatasetDict({split: pairs(rows) for split, rows in bbc_news().items()})


def new_model(tokenizer) -> T5ForConditionalGeneration:
    """Make a T5 of two layers each way and one million parameters."""
    names = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id, **names, **sizes)
    )


def overlap(written: str, wanted: str) -> float:
    """Compute the F1 of the words that both have, which is ROUGE-1 without stemming."""
    a, b = Counter(written.lower().split()), Counter(wanted.lower().split())
    return 2 * sum((a & b).values()) / max(1, sum(a.values()) + sum(b.values()))


def scores(written: list[str], wanted: list[str]) -> dict[str, float]:
    """Compute the mean overlap of words, the share of exact matches and, where rouge_score is installed, ROUGE."""
    pairs = list(zip(written, wanted, strict=True))
    found = {"overlap": float(np.mean([overlap(*pair) for pair in pairs])), "exact": float(np.mean([a == b for a, b in pairs]))}
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return found
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    scored = [scorer.score(b, a) for a, b in pairs]
    return found | {kind: float(np.mean([score[kind].fmeasure for score in scored])) for kind in kinds}


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    ours, args = parse((Arguments, TrainingArguments), __doc__.split("\n")[0], argv)
    data = load_dataset(ours.dataset_name, ours.dataset_config_name) if ours.dataset_name else headlines()
    if ours.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(ours.model_name_or_path)
    else:
        tokenizer = learn_tokenizer([f"{row[ours.text_column]} {row[ours.summary_column]}" for row in data["train"]])

    def encode(batch):
        end = "" if ours.model_name_or_path else tokenizer.eos_token  # a pretrained model's tokenizer adds it
        texts = tokenizer([ours.source_prefix + text for text in batch[ours.text_column]], truncation=True,
                          max_length=ours.max_source_length)  # fmt: skip
        targets = tokenizer(text_target=[text + end for text in batch[ours.summary_column]], truncation=True,
                            max_length=ours.max_target_length)  # fmt: skip
        return {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"], "labels": targets["input_ids"]}

    evaluated = "validation" if "validation" in data else "test"
    splits = []
    for split, limit in (("train", ours.max_train_samples), (evaluated, ours.max_eval_samples)):
        rows = data[split].select(range(min(len(data[split]), limit or len(data[split]))))
        splits.append(rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}"))
    set_seed(args.seed)  # new weights
    if ours.model_name_or_path:
        model = AutoModelForSeq2SeqLM.from_pretrained(ours.model_name_or_path, dtype="float32")
    else:
        model = new_model(tokenizer)

    def compute_metrics(p) -> dict[str, float]:
        tokens = [np.where(part == -100, tokenizer.pad_token_id, part) for part in (p.predictions, p.label_ids)]
        written, wanted = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in tokens)
        return scores(written, wanted)

    args.generation_max_length = args.generation_max_length or ours.max_target_length
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=splits[0],
        eval_dataset=splits[1],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics if args.predict_with_generate else None,
    )
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    metrics |= {"train_samples": len(splits[0]), **costs(model, trainer.optimizer)}
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    found = trainer.evaluate() | {"eval_samples": len(splits[1])}
    trainer.log_metrics("eval", found)
    trainer.save_metrics("eval", found)
    results = metrics | found
    if trainer.is_world_process_zero():
        name = ours.model_name_or_path or "a new T5"
        title = f"{args.optim.value}, {name} on {ours.dataset_name or 'headlines of BBC News'}; files in {args.output_dir}"
        print("\n" + summary(title, results, "eval_loss", "eval_overlap", "eval_exact", "eval_rouge1", "eval_rougeL"))
    return results


if __name__ == "__main__":
    main()
