"""Fine-tune a model that marks answers in a text, as in SQuAD, with a compressed full-matrix optimizer.

Without arguments: the pretrained MiniLM-L6 BERT on questions on BBC News with `--optim efcp_lowrank_mfac`, offline, in a few
minutes on two CPU cores. With arguments: any model and data set of the hub, or local .json and .jsonl files:

    python recipes/question_answering.py
    python recipes/question_answering.py --optim adamw_torch
    python recipes/question_answering.py --model_name_or_path bert-base-uncased --dataset_name squad --learning_rate 5e-5
    python recipes/question_answering.py --dataset_name squad_v2 --version_2_with_negative true --learning_rate 5e-5
    python recipes/question_answering.py --train_file train-v1.1.json --validation_file dev-v1.1.json --learning_rate 5e-5
"""

import json
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.hf_argparser import HfArg

from hf_efcp import EFCPTrainer, EFCPTrainingArguments, OptionError
from hf_efcp.demo.bbc import minilm_folder
from hf_efcp.demo.questions import bbc_gaps, bbc_questions
from hf_efcp.demo.running import costs, parse, summary

COLUMNS = ("id", "context", "question", "answers")
OFFLINE = "bbc_questions"


@dataclass
class Arguments:
    """Which model to fine-tune, on which questions, and how answers are read off."""

    model_name_or_path: str | None = HfArg(default=None, help="Model on the hub or local folder. Default: MiniLM-L6 BERT.")
    dataset_name: str | None = HfArg(default=None, help=f"Data set on the hub, such as squad. Default: {OFFLINE} (offline).")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration on the hub.")
    train_file: str | None = HfArg(default=None, help="Local .json in SQuAD's form, or .json or .jsonl with a row a question.")
    validation_file: str | None = HfArg(default=None, help="Local validation data, needed beside --train_file.")
    gaps: int = HfArg(default=480, help=f"{OFFLINE}: questions made of other articles' sentences, to learn from first.")
    repeats: int = HfArg(default=3, help=f"{OFFLINE}: how often an epoch has the questions written by hand.")
    held_out_articles: int = HfArg(
        default=0,
        help=f"{OFFLINE}: to choose settings, evaluate on the questions of so many training articles, left out of training; "
        "0: evaluate on the test questions.",
    )
    max_seq_length: int = HfArg(default=320, help="Longest window of question and context in tokens; longer contexts are cut.")
    doc_stride: int = HfArg(default=96, help="Tokens that a window has in common with the next.")
    max_answer_length: int = HfArg(default=30, help="Longest answer in tokens.")
    n_best_size: int = HfArg(default=20, help="Starts and ends of a window that are tried with each other.")
    version_2_with_negative: bool = HfArg(default=False, help="Some questions have no answer, as in squad_v2.")
    null_score_diff_threshold: float = HfArg(default=0.0, help="No answer where its score beats the best answer's by more.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many questions, drawn at random.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on this many questions, drawn at random.")

    def __post_init__(self):
        """Refuse what cannot work before anything is loaded."""
        if self.dataset_name and (self.train_file or self.validation_file):
            raise OptionError("--dataset_name and --train_file are both given: choose one")
        if bool(self.train_file) != bool(self.validation_file):
            raise OptionError("local data needs both --train_file and --validation_file")
        for name in ("train_file", "validation_file"):
            file = getattr(self, name)
            if file and not (file.endswith((".json", ".jsonl")) and Path(file).is_file()):
                raise OptionError(f"--{name} {file!r}: must be a .json or .jsonl file that exists")
        least = {"gaps": 0, "repeats": 1, "held_out_articles": 0, "doc_stride": 0, "max_answer_length": 1, "n_best_size": 1}
        for name, bound in (least | {"max_train_samples": 1, "max_eval_samples": 1}).items():
            if getattr(self, name) is not None and getattr(self, name) < bound:
                raise OptionError(f"--{name} {getattr(self, name)}: must be at least {bound}")
        if self.held_out_articles and (self.train_file or self.dataset_name not in (None, OFFLINE)):
            raise OptionError(f"--held_out_articles {self.held_out_articles}: only {OFFLINE} has articles to hold out")


@dataclass
class TrainingArguments(EFCPTrainingArguments):
    """The Trainer's arguments, with this recipe's defaults. Neither --do_train nor --do_eval: both."""

    output_dir: str | None = HfArg(default="outputs/question_answering", help="Folder for results, model and checkpoints.")
    learning_rate: float = HfArg(default=4e-4, help="The highest learning rate. Whole epochs of SQuAD want less, such as 5e-5.")
    per_device_train_batch_size: int = HfArg(default=12, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Evaluation batch size per device.")
    num_train_epochs: float = HfArg(default=1.0, help="Number of passes over the training data.")
    logging_steps: float = HfArg(default=20, help="Log every so many steps; below 1: a share of all steps.")
    report_to: str | None = HfArg(default="none", help="Integrations that get the logs, such as tensorboard or wandb.")
    dataloader_pin_memory: bool = HfArg(default=torch.accelerator.is_available(), help="Pin memory; useless without a GPU.")

    def __post_init__(self):
        """Train and evaluate where nothing is asked for."""
        if not (self.do_train or self.do_eval):
            self.do_train = self.do_eval = True
        super().__post_init__()


# Data ---------------------------------------------------------------------------------------------------------------------


def read_file(file: str) -> Dataset:
    """Read questions from SQuAD's nested JSON, from a list of rows (or {"data": rows}), or from a row a line (.jsonl)."""
    text = Path(file).read_text(encoding="utf-8")
    try:
        data = [json.loads(line) for line in text.splitlines() if line.strip()] if file.endswith("l") else json.loads(text)
        data = data["data"] if isinstance(data, dict) else data
        if data and "paragraphs" in data[0]:
            data = [{**qa, "context": p["context"]} for article in data for p in article["paragraphs"] for qa in p["qas"]]
        rows = [{name: row[name] for name in COLUMNS} for row in data]
        for row in rows:
            answers = row["answers"]
            if isinstance(answers, list):  # SQuAD's own form: a list of {"text", "answer_start"}
                answers = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
            row["answers"] = {"text": list(answers["text"]), "answer_start": [int(i) for i in answers["answer_start"]]}
            row["id"] = str(row["id"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        wanted = f"SQuAD's JSON, or rows with {', '.join(COLUMNS)}"
        raise OptionError(f"{file!r} is not {wanted}: {type(error).__name__}: {error}") from None
    if not rows:
        raise OptionError(f"{file!r} has no questions")
    return Dataset.from_list(rows)


def load_questions(ours: Arguments, seed: int) -> DatasetDict:
    """Load the splits "train" and "validation", checked: ids differ, every answer stands where it is said to."""
    if ours.train_file:
        data = {"train": read_file(ours.train_file), "validation": read_file(ours.validation_file)}
    elif ours.dataset_name in (None, OFFLINE):
        questions = bbc_questions()
        if ours.held_out_articles:
            questions = hold_out(questions["train"], ours.held_out_articles)
        parts = ([bbc_gaps(ours.gaps)] if ours.gaps else []) + [questions["train"]] * ours.repeats
        shuffled = [part.shuffle(seed=seed + i) for i, part in enumerate(parts)]
        data = {"train": concatenate_datasets(shuffled), "validation": questions["test"]}
    else:
        data = load_dataset(ours.dataset_name, ours.dataset_config_name)
    for split, limit in (("train", ours.max_train_samples), ("validation", ours.max_eval_samples)):
        if split not in data or not set(COLUMNS) <= set(data[split].column_names):
            raise OptionError(f"the data needs splits train and validation with the columns {', '.join(COLUMNS)}")
        if limit is not None and limit < len(data[split]):  # drawn, because data are sorted by article
            data[split] = data[split].shuffle(seed=seed).select(range(limit))
        for row in data[split]:
            answers = row["answers"]
            if not answers["text"] and not ours.version_2_with_negative:
                raise OptionError(f"question {row['id']!r} has no answer: --version_2_with_negative allows this")
            for text, start in zip(answers["text"], answers["answer_start"], strict=True):
                if not row["context"].startswith(text, start):
                    raise OptionError(f"question {row['id']!r}: the answer {text!r} is not at character {start} of its context")
    if len(set(data["validation"]["id"])) < len(data["validation"]):
        raise OptionError("validation data: two questions have the same id")
    return DatasetDict(data)


def hold_out(rows: Dataset, count: int) -> DatasetDict:
    """Split training questions by article: those of `count` articles, spread evenly over the topics, become the test split."""
    articles = sorted(set(rows["title"]))
    if count >= len(articles):
        raise OptionError(f"--held_out_articles {count}: must be less than {len(articles)}, the number of training articles")
    chosen = {articles[i * len(articles) // count] for i in range(count)}
    test = [i for i, title in enumerate(rows["title"]) if title in chosen]
    return DatasetDict({"train": rows.select(sorted(set(range(len(rows))) - set(test))), "test": rows.select(test)})


def windows(batch, tokenizer, ours: Arguments) -> dict[str, list]:
    """Cut questions and contexts into windows of tokens; the span to find is that of the first answer.

    Where the answer is not wholly in a window, or there is none, the span is the first token, [CLS]. "offsets" are the characters
    of each token of the context, and [-1, -1] for all other tokens.
    """
    questions = [question.strip() for question in batch["question"]]
    tokens = tokenizer(
        questions,
        batch["context"],
        truncation="only_second",
        max_length=ours.max_seq_length,
        stride=ours.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    sources = tokens.pop("overflow_to_sample_mapping")
    result = {**tokens, "id": [], "offsets": [], "start_positions": [], "end_positions": []}
    for window, (source, places) in enumerate(zip(sources, result.pop("offset_mapping"), strict=True)):
        offsets = [p if part == 1 else (-1, -1) for p, part in zip(places, tokens.sequence_ids(window), strict=True)]
        answers = batch["answers"][source]
        start, end = 0, 0
        if answers["text"]:
            first, behind = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
            starts = [i for i, (a, b) in enumerate(offsets) if a <= first < b]
            ends = [i for i, (a, b) in enumerate(offsets) if a < behind <= b]
            if starts and ends:
                start, end = starts[0], ends[-1]
        values = (batch["id"][source], offsets, start, end)
        for name, value in zip(("id", "offsets", "start_positions", "end_positions"), values, strict=True):
            result[name].append(value)
    return result


# Answers and their score --------------------------------------------------------------------------------------------------


def best_answers(rows: Dataset, cut: Dataset, starts: np.ndarray, ends: np.ndarray, ours: Arguments) -> dict[str, str]:
    """Read off the answer to every question: the span with the largest sum of logits over all windows of its context.

    Args:
        rows: the questions.
        cut: their windows, from `windows`.
        starts: logits of the first token, window x token; windows may be padded.
        ends: logits of the last token.
        ours: `n_best_size`, `max_answer_length`, `version_2_with_negative`, `null_score_diff_threshold`.

    Returns:
        The answer by id; "" where there is none.
    """
    best = dict.fromkeys(rows["id"], (-np.inf, 0, 0))
    null = dict.fromkeys(rows["id"], np.inf)
    for name, offsets, start, end in zip(cut["id"], cut["offsets"], starts, ends, strict=True):
        null[name] = min(null[name], start[0] + end[0])  # no answer means: none in any window
        context = np.array([i for i, (first, _) in enumerate(offsets) if first >= 0], dtype=int)
        firsts = context[np.argsort(-start[context], kind="stable")[: ours.n_best_size]]
        lasts = context[np.argsort(-end[context], kind="stable")[: ours.n_best_size]]
        for i in firsts:
            for j in lasts:
                if i <= j < i + ours.max_answer_length and start[i] + end[j] > best[name][0]:
                    best[name] = (start[i] + end[j], offsets[i][0], offsets[j][1])
    answers = {}
    for name, context in zip(rows["id"], rows["context"], strict=True):
        score, first, behind = best[name]
        without = ours.version_2_with_negative and null[name] - score > ours.null_score_diff_threshold
        answers[name] = "" if without else context[first:behind]
    return answers


def words(text: str) -> list[str]:
    """Split a text into words as SQuAD compares them: small letters, no punctuation, none of a, an, the."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's words; if one has no words: 1 where neither has any."""
    found, wanted = words(answer), words(reference)
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def score(answers: dict[str, str], rows: Dataset) -> dict[str, float]:
    """Return exact match and F1 in percent, each against the reference that fits best; if some have no answer, by kind too."""
    exact, overlap = [], []
    for name, truth in zip(rows["id"], rows["answers"], strict=True):
        references = [text for text in truth["text"] if words(text)] or [""]
        exact.append(max(words(answers[name]) == words(reference) for reference in references))
        overlap.append(max(f1(answers[name], reference) for reference in references))
    has = np.array([bool(truth["text"]) for truth in rows["answers"]])
    kinds = {"": np.ones_like(has), "has_answer_": has, "no_answer_": ~has} if not has.all() else {"": has}
    return {
        f"{kind}{name}": 100 * float(np.mean(np.array(values)[which]))
        for kind, which in kinds.items()
        if which.any()
        for name, values in (("exact_match", exact), ("f1", overlap))
    }


# Training -----------------------------------------------------------------------------------------------------------------


class InOrder(EFCPTrainer):
    """Train on the rows as they stand: gaps first, which is easier, then the questions that count."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def main(argv: list[str] | None = None) -> dict:
    """Train and evaluate; return what all_results.json gets."""
    ours, args = parse((Arguments, TrainingArguments), __doc__.split("\n")[0], argv)
    source = ours.model_name_or_path or minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast:
        raise OptionError(f"--model_name_or_path {source!r}: has no fast tokenizer, which tells where in the text a token is")
    set_seed(args.seed)  # the new head
    model = AutoModelForQuestionAnswering.from_pretrained(source, dtype="float32")  # small updates vanish in 16-bit weights
    # Its loss is a batch mean. Unless told, Trainer takes it for a sum: N processes or accumulation steps would give N times it.
    model.accepts_loss_kwargs = False
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or ours.max_seq_length)
    if ours.max_seq_length > longest:
        raise OptionError(f"--max_seq_length {ours.max_seq_length}: this model takes at most {longest}")
    data = load_questions(ours, args.seed)
    for split, rows in data.items():
        question = max(len(ids) for ids in tokenizer(list(rows["question"]), add_special_tokens=False)["input_ids"])
        room = ours.max_seq_length - question - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= ours.doc_stride:
            raise OptionError(
                f"--max_seq_length {ours.max_seq_length} leaves {room} tokens for contexts beside the longest question of the "
                f"{split} split: needs more than --doc_stride {ours.doc_stride}"
            )

    def cut(rows: Dataset) -> Dataset:
        given = {"tokenizer": tokenizer, "ours": ours}
        return rows.map(windows, batched=True, remove_columns=rows.column_names, fn_kwargs=given, desc="Cutting into windows")

    with args.main_process_first(desc="tokenizing"):
        train, held_out = cut(data["train"]), cut(data["validation"])

    def answers_of(logits) -> dict[str, str]:
        return best_answers(data["validation"], held_out, logits[0], logits[1], ours)

    trainer = (InOrder if data["train"][0]["id"].startswith("gap-") else EFCPTrainer)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: score(answers_of(p.predictions), data["validation"]),
    )
    results = {}
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        metrics |= {"train_samples": len(data["train"]), **costs(model, trainer.optimizer)}
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        results |= metrics
    if args.do_eval:
        predicted = trainer.predict(held_out, metric_key_prefix="eval")
        metrics = predicted.metrics | {"eval_samples": len(data["validation"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results |= metrics
        if trainer.is_world_process_zero():
            text = json.dumps(answers_of(predicted.predictions), indent=1, ensure_ascii=False)
            Path(args.output_dir, "predictions.json").write_text(text, encoding="utf-8")
    if trainer.is_world_process_zero():
        title = f"{args.optim.value} on {ours.dataset_name or ours.train_file or OFFLINE}; files in {args.output_dir}"
        names = [name for name in results if name.endswith(("exact_match", "f1"))]
        print("\n" + summary(title, results, *names, "eval_loss"))
    return results


if __name__ == "__main__":
    try:
        main()
    except OptionError as error:  # a mistake in the arguments or the data: nothing was trained
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
