"""The question answering recipe: windows, answers, their score, local files, runs end to end."""

import importlib.util
import json
import random
import shutil
import sys

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.recipes.helpers import RECIPES, WORDS
from tests.recipes.test_questions import needs_packages


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe as it is when its file is copied alone into an empty folder."""
    copy = shutil.copy(RECIPES / "question_answering.py", tmp_path_factory.mktemp("alone"))
    spec = importlib.util.spec_from_file_location("copied_question_answering", copy)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [path for path in sys.path if path != str(RECIPES)])
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def question(name, context, text, answer=None, **more):
    start = [] if answer is None else [context.index(answer)]
    answers = {"text": [] if answer is None else [answer], "answer_start": start}
    return {"id": name, "context": context, "question": text, "answers": answers, **more}


# Windows ------------------------------------------------------------------------------------------------------------------


def test_every_window_points_at_the_answer_or_at_its_first_token(recipe, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    animals, fruit = WORDS["animal"], WORDS["fruit"][0]
    context = " ".join([*animals, *animals, fruit, *animals])
    rows = [question("1", context, "the a the", fruit), question("2", context, " a")]
    ours = recipe.Arguments(max_seq_length=12, doc_stride=3)
    cut = recipe.windows({name: [row[name] for row in rows] for name in recipe.COLUMNS}, tokenizer, ours)
    count = len(cut["id"])
    assert count > 4
    assert all(len(values) == count for values in cut.values())
    found = 0
    for name, ids, offsets, start, end in zip(
        *(cut[n] for n in ("id", "input_ids", "offsets", "start_positions", "end_positions")), strict=True
    ):
        assert len(ids) <= 12
        places = [place for place in offsets if place[0] >= 0]
        covered = context[places[0][0] : places[-1][1]]
        if name == "1" and fruit in covered:
            found += 1
            assert context[offsets[start][0] : offsets[end][1]] == fruit
        else:
            assert (start, end) == (0, 0)
    assert found >= 1
    seen = [{place for place in cut["offsets"][i] if place[0] >= 0} for i in range(2)]
    assert len(seen[0] & seen[1]) == 3  # the stride
    everything = {place for name, offsets in zip(cut["id"], cut["offsets"], strict=True) if name == "1" for place in offsets}
    assert len(everything - {(-1, -1)}) == len(context.split())


# Answers ------------------------------------------------------------------------------------------------------------------

TEXT = "one two three four five six"
PLACES = [[0, 3], [4, 7], [8, 13], [14, 18], [19, 23], [24, 27]]


def answer(recipe, starts, ends, **options):
    """The answer for windows [CLS] question [SEP] and the six words (the second window has the last three only)."""
    rows = Dataset.from_list([question("1", TEXT, "?", "one")])
    cut = {"id": ["1"] * len(starts), "offsets": [[[-1, -1]] * 2 + PLACES, [[-1, -1]] * 2 + PLACES[3:]][: len(starts)]}
    ours = recipe.Arguments(**options)
    padded = [np.array([row + [99.0] * (9 - len(row)) for row in logits]) for logits in (starts, ends)]  # padding never counts
    return recipe.best_answers(rows, cut, *padded, ours)["1"]


def test_the_best_span_wins_within_its_limits(recipe):
    start, end = [9, 9, 0, 5, 0, 0, 0, 0], [9, 9, 0, 0, 0, 0, 4, 0]
    assert answer(recipe, [start], [end]) == "two three four five"  # the question's own tokens, 9, are no answer
    assert answer(recipe, [start], [end], max_answer_length=3) == "two"  # 5 + 0 before 0 + 4; the first end of equal ones
    assert answer(recipe, [start], [end], max_answer_length=4) == "two three four five"
    backwards = answer(recipe, [[0, 0, 0, 0, 0, 0, 5, 0]], [[0, 0, 4, 0, 0, 0, 0, 3]])
    assert backwards == "five six"  # an end before the start, 5 + 4, is no span
    assert answer(recipe, [[0, 0, 0, 0, 0, 0, 5, 0]], [[0, 0, 4, 0, 0, 0, 0, 3]], n_best_size=1) == ""  # nothing else was tried


def test_windows_compete(recipe):
    first, second = [0, 0, 0, 2, 0, 0, 0, 0], [0, 0, 0, 3, 0]
    assert answer(recipe, [first, second], [first, second]) == "five"
    assert answer(recipe, [first, [0, 0, 0, 1, 0]], [first, [0, 0, 0, 1, 0]]) == "two"


def test_no_answer_must_be_best_in_every_window(recipe):
    first, second = [5, 0, 0, 2, 0, 0, 0, 0], [3, 0, 0, 1, 0]  # no answer scores 10 and 6: 6 counts; "two" scores 4
    options = {"version_2_with_negative": True}
    assert answer(recipe, [first, second], [first, second], **options) == ""
    assert answer(recipe, [first, second], [first, second], **options, null_score_diff_threshold=1.9) == ""
    assert answer(recipe, [first, second], [first, second], **options, null_score_diff_threshold=2) == "two"
    assert answer(recipe, [first, [1, 0, 0, 0, 0]], [first, [1, 0, 0, 0, 0]], **options) == "two"
    assert answer(recipe, [first, second], [first, second]) == "two"


# Score --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "wanted", "exact", "overlap"),
    [
        ("The  U.S. dollar!", "us dollar", True, 1),
        ("in New York", "New York City", False, 2 / 3),  # 2 of 3 and 2 of 3
        ("a theatre", "theatre", True, 1),  # the letters of "the" inside a word stay
        ("cat cat", "cat", False, 2 / 3),  # a word counts as often as it occurs
        ("$1.5bn", "15bn", True, 1),
        ("dog", "cat", False, 0),
        ("", "cat", False, 0),
        ("the", "", True, 1),
        ("five", "", False, 0),
    ],
)
def test_known_scores(recipe, found, wanted, exact, overlap):
    assert (recipe.words(found) == recipe.words(wanted)) is exact
    assert recipe.f1(found, wanted) == pytest.approx(overlap)


def test_the_best_reference_counts_and_kinds_are_told_apart(recipe):
    rows = Dataset.from_list([question("1", TEXT, "?", "one two"), question("2", TEXT, "?"), question("3", TEXT, "?", "six")])
    more = [{"text": ["five", "one two"], "answer_start": [19, 0]}, rows[1]["answers"], rows[2]["answers"]]
    rows = rows.remove_columns("answers").add_column("answers", more)
    scores = recipe.score({"1": "one", "2": "", "3": "five"}, rows)
    assert scores == {
        "exact_match": pytest.approx(100 / 3),
        "f1": pytest.approx(100 * (2 / 3 + 1 + 0) / 3),
        "has_answer_exact_match": 0,
        "has_answer_f1": pytest.approx(100 / 3),
        "no_answer_exact_match": 100,
        "no_answer_f1": 100,
    }
    assert set(recipe.score({"1": "one", "3": "six"}, rows.select([0, 2]))) == {"exact_match", "f1"}


# Files and mistakes -------------------------------------------------------------------------------------------------------


def test_the_three_forms_of_a_file_are_the_same_data(recipe, tmp_path):
    rows = [question("1", TEXT, "Which?", "two"), question("2", TEXT, "None?")]
    qas = [{**row, "answers": [{"text": "two", "answer_start": 4}] if row["id"] == "1" else []} for row in rows]
    forms = {
        "squad.json": json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": TEXT, "qas": qas}]}]}),
        "rows.json": json.dumps({"data": rows}),
        "list.json": json.dumps(rows),
        "lines.jsonl": "\n".join(map(json.dumps, rows)) + "\n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert recipe.read_file(str(tmp_path / name)).to_list() == rows, name


@pytest.mark.parametrize("text", ["{", "[]", '[{"id": "1", "context": "x"}]', '{"data": 3}', "[3]"])
def test_a_bad_file_is_one_line(recipe, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(recipe.OptionError, match=r"bad\.json' (is not SQuAD's JSON, or rows with id, context|has no questions)"):
        recipe.read_file(str(tmp_path / "bad.json"))


def test_questions_are_checked_before_training(recipe, tmp_path):
    good, none = question("1", TEXT, "?", "two"), question("2", TEXT, "?")
    moved = question("3", TEXT, "?", "two") | {"answers": {"text": ["two"], "answer_start": [5]}}

    def load(train, validation, **options):
        for name, rows in (("train", train), ("validation", validation)):
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        files = {f"{name}_file": str(tmp_path / f"{name}.json") for name in ("train", "validation")}
        return recipe.load_questions(recipe.Arguments(**files, **options), seed=0)

    assert load([good, none], [good], version_2_with_negative=True)["train"].num_rows == 2
    with pytest.raises(recipe.OptionError, match="'2' has no answer: --version_2_with_negative"):
        load([good, none], [good])
    with pytest.raises(recipe.OptionError, match="'3': the answer 'two' is not at character 5"):
        load([good], [moved])
    with pytest.raises(recipe.OptionError, match="same id"):
        load([good], [good, good])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "squad", "--train_file", "x.json"], "choose one"),
        (["--train_file", "x.json"], "needs both"),
        (["--train_file", "x.csv", "--validation_file", "x.csv"], "must be a .json or .jsonl file that exists"),
        (["--n_best_size", "0"], "--n_best_size 0: must be at least 1"),
        (["--held_out_articles", "2", "--dataset_name", "squad"], "--held_out_articles 2: only bbc_questions has articles"),
        (["--optim", "efcp_lowrank_mfak"], "efcp_lowrank_mfac"),
    ],
)
def test_a_wrong_flag_is_one_line(recipe, capsys, flags, message):
    with pytest.raises((SystemExit, recipe.OptionError)) as stopped:
        recipe.main(flags)
    assert message in capsys.readouterr().err + str(stopped.value)


# Runs ---------------------------------------------------------------------------------------------------------------------


def test_a_run_on_a_local_file_learns_what_has_an_answer(recipe, tiny_model, tmp_path, capsys):
    """The answer is the fruit among animals; where there is none, there is no answer."""
    rng = random.Random(0)
    rows = []
    for i in range(128):
        context = rng.choices(WORDS["animal"], k=5) + [rng.choice(WORDS["fruit"])] * (i % 3 > 0)
        fruit = context[-1] if i % 3 else None
        rng.shuffle(context)
        rows.append(question(str(i), " ".join(context), "the a", fruit))
    files = {"train_file": rows[:96], "validation_file": rows[96:]}
    for name, part in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    flags = [f"--{name}={tmp_path}/{name}.json" for name in files] + [f"--model_name_or_path={tiny_model}", "--output_dir=out"]
    flags += ["--max_seq_length=16", "--doc_stride=2", "--version_2_with_negative=true", "--learning_rate=5e-3"]
    results = recipe.main([*flags, "--num_train_epochs=5", "--save_strategy=no", "--use_cpu=true"])
    assert results["eval_f1"] > 90
    assert results["eval_no_answer_f1"] > 80
    assert results["train_samples"] == 96
    assert results["train_optimizer_state_bytes"] > 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert set(written) == {row["id"] for row in rows[96:]}
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_f1"] == results["eval_f1"]
    assert "eval has answer f1" in capsys.readouterr().out
    again = recipe.main([*flags, "--do_eval", "--use_cpu=true", "--model_name_or_path=out"])  # what was saved
    assert again["eval_f1"] == results["eval_f1"]
    with pytest.raises(recipe.OptionError, match="leaves 11 tokens for contexts"):
        recipe.main([*flags, "--doc_stride=11"])


@needs_packages
def test_the_offline_questions_stand_behind_the_gaps(recipe, monkeypatch):
    few = {name: rows.select(range(5)) for name, rows in recipe.bbc_questions().items()}
    monkeypatch.setattr(recipe, "bbc_questions", lambda: few)
    monkeypatch.setattr(
        recipe,
        "bbc_gaps",
        lambda count: few["train"].select(range(count)).map(lambda _, i: {"id": f"gap-{i}"}, with_indices=True),
    )
    ids = recipe.load_questions(recipe.Arguments(gaps=3, repeats=2), seed=0)["train"]["id"][:]
    assert sorted(ids[:3]) == ["gap-0", "gap-1", "gap-2"]
    assert sorted(ids[3:8]) == sorted(ids[8:]) == sorted(few["train"]["id"])
    assert ids[3:8] != ids[8:]  # each time in another order
    assert recipe.load_questions(recipe.Arguments(gaps=0, repeats=1), seed=0)["train"].num_rows == 5


def test_settings_are_chosen_on_articles_that_training_does_not_see(recipe):
    rows = Dataset.from_list([question(str(i), TEXT, "?", "one", title=f"{'ab'[i // 8]}/{i // 2}") for i in range(16)])
    split = recipe.hold_out(rows, 4)
    titles = {name: set(part["title"]) for name, part in split.items()}
    assert titles["test"] == {"a/0", "a/2", "b/4", "b/6"}  # as many of each topic
    assert titles["train"].isdisjoint(titles["test"]) and sum(map(len, split.values())) == 16
    with pytest.raises(recipe.OptionError, match="--held_out_articles 8: must be less than 8"):
        recipe.hold_out(rows, 8)


@needs_packages
def test_the_offline_default_runs(recipe, tmp_path):
    """Two steps on the offline questions with its tokenizer, and a model that is small."""
    from transformers import BertConfig, BertForQuestionAnswering

    AutoTokenizer.from_pretrained(recipe.minilm_folder()).save_pretrained(tmp_path / "small")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForQuestionAnswering(BertConfig(vocab_size=30522, **sizes)).save_pretrained(tmp_path / "small")
    flags = ["--model_name_or_path", str(tmp_path / "small"), "--gaps", "20", "--repeats", "1", "--max_eval_samples", "10"]
    results = recipe.main([*flags, "--max_steps", "2", "--save_strategy", "no", "--use_cpu", "true", "--output_dir", "out"])
    assert results["train_samples"] == 268
    assert results["eval_samples"] == 10
    assert 0 <= results["eval_exact_match"] <= results["eval_f1"] <= 100
