"""The runner of recipes/reproduce: what a spec wants, what a run records, what is not repeated."""

import json
import math
import sys
from fractions import Fraction

import pytest
import torch
import yaml

import hf_efcp
from tests.recipes.helpers import RECIPES  # puts the recipes on the path

pytest.importorskip("sklearn")
from reproduce import report, run, training
from reproduce.contenders import Contender, ProductsInFp32, Together, Unavailable
from reproduce.spec import Run, SpecError, read_results, read_spec, write_result
from reproduce.tasks import TASKS, get_task

ADAMW = {"optimizer": "torch.optim.AdamW"}
SETTINGS = {"steps": 3, "batch_size": 8, "examples": 16}
SMALL = {"task": "digits_resnet", **SETTINGS}


@pytest.fixture
def spec_file(tmp_path):
    """Write a spec, of small tasks unless told otherwise, and return its path."""

    def write(name="small", **changes):
        spec = {"tasks": {"small": SMALL}, "rates": [1], "seeds": [0], "contenders": {"adamw": ADAMW}, **changes}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        return path

    return write


def test_the_committed_specs_can_be_read():
    paths = sorted((RECIPES / "reproduce/specs").glob("*.yaml"))
    assert "quality" in [path.stem for path in paths]
    for path in paths:
        assert read_spec(path).wanted({})


def test_the_quality_spec_gives_the_default_no_option():
    spec = read_spec(RECIPES / "reproduce/specs/quality.yaml")
    (ours,) = spec.families["ours"]
    measured = hf_efcp.LowRankMFAC.measured
    assert not ours.options
    assert ours.identity() == {
        "optimizer": "efcp_lowrank_mfac",
        "options": {k: str(v) if isinstance(v, torch.dtype) else v for k, v in measured.items()},
    }
    assert set(spec.tasks) == set(TASKS) - {"larger_llama"}  # for a GPU
    assert [c.options["betas"] for c in spec.families["adamw"]] == [[0.9, 0.999], [0.9, 0.95], [0.8, 0.99]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": [1]}, "unknown rate; valid: .*rates"),
        ({"tasks": {"digit": None}}, "unknown task 'digit'.*digits_vit"),
        ({"tasks": {"small": {**SMALL, "step": 1}}}, "unknown setting step; valid: steps"),
        ({"contenders": {"adamw": {**ADAMW, "option": {}}}}, "contender adamw: unknown option"),
        ({"contenders": {"a": {**ADAMW, "variant_of": "b"}}}, "variant_of 'b' does not come before it"),
        ({"contenders": {"a": {**ADAMW, "tasks": ["x"]}}}, "no task x here"),
        ({"compare": [["adamw", "x"]]}, "no contender x"),
        ({"rates": ["fast"]}, "fast"),
        ({"device": "gpu"}, "device: 'gpu' is none of cpu, cuda"),
    ],
)
def test_a_mistake_in_a_spec_is_named(spec_file, changes, message):
    with pytest.raises(SpecError, match=message):
        read_spec(spec_file(**changes))


# What a spec wants --------------------------------------------------------------------------------------------------------


def results_of(runs, validation):
    """Results whose validation loss is `validation(run)`, infinite: diverged."""
    results = {}
    for r in runs:
        value = validation(r)
        results[r.key()] = {"validation": None if math.isinf(value) else {"loss": value}}
    return results


def finish(spec, validation):
    """Results of all runs that are wanted, until no new one is."""
    results = {}
    while left := [r for r in spec.wanted(results) if r.key() not in results]:
        results |= results_of(left, validation)
    return results


@pytest.mark.parametrize(
    ("best", "expected"),
    [(3, ["1/3", "1", "3", "10"]), (30, ["1/3", "1", "3", "10", "30", "90"]), (0.01, ["1/27", "1/9", "1/3", "1", "3", "10"])],
)
def test_the_grid_is_widened_twice_at_most_where_the_best_rate_is_on_its_edge(spec_file, best, expected):
    spec = read_spec(spec_file(rates=["1/3", 1, 3, 10], widen=2))
    results = finish(spec, lambda r: abs(math.log(r.multiple / best)))
    assert [str(r.multiple) for r in spec.grid("small", spec.families["adamw"][0], results)] == expected


def test_the_final_runs_are_at_the_best_rate_and_variant_and_at_the_usual_rate_of_the_first(spec_file):
    contenders = {"adamw": ADAMW, "other": {**ADAMW, "options": {"betas": [0.9, 0.95]}, "variant_of": "adamw"}}
    spec = read_spec(spec_file(rates=[1, 3], contenders=contenders, final_seeds=[1, 2]))
    losses = {("adamw", 1): 2.0, ("adamw", 3): math.inf, ("other", 1): 1.5, ("other", 3): 1.0}
    results = finish(spec, lambda r: losses[r.contender.name, r.multiple])
    final = [(r.contender.name, r.multiple, r.seed) for r in spec.wanted(results) if r.stage == "final"]
    assert final == [("other", 3, 1), ("other", 3, 2), ("adamw", 1, 1), ("adamw", 1, 2)]


def test_no_final_run_is_wanted_before_the_grid_is_finished(spec_file):
    spec = read_spec(spec_file(rates=[1, 3], final_seeds=[1, 2]))
    first, second = spec.wanted({})
    assert {first.stage, second.stage} == {"grid"}
    assert spec.chosen("small", "adamw", results_of([first], lambda r: 1.0)) is None
    assert len(spec.wanted(results_of([first, second], lambda r: 1.0))) == 4  # both rates are as good: 1 is the usual one too


def test_without_final_seeds_the_table_has_the_runs_of_the_grid(spec_file):
    spec = read_spec(spec_file(rates=[1, 3], seeds=[0, 1]))
    results = finish(spec, lambda r: 1.0 / r.multiple)
    best, usual = spec.final("small", "adamw", results)
    assert len(results) == 4 and {r.key() for r in best + usual} == results.keys()
    assert [(r.multiple, r.seed) for r in best] == [(3, 0), (3, 1)]


def test_a_run_is_told_apart_by_all_that_decides_its_result():
    def key(label="small", name="adamw", options=None, multiple=1, seed=0, stage="grid", **settings):
        task = get_task("digits_vit", **settings)
        return Run(label, task, Contender(name, "torch.optim.AdamW", options or {}), Fraction(multiple), seed, stage).key()

    assert key() == key(label="other", name="other", stage="final")
    others = [key(options={"betas": [0.9, 0.95]}), key(multiple=3), key(seed=1), key(steps=5), key(batch_size=8)]
    assert len({key(), *others}) == 6


# Contenders ---------------------------------------------------------------------------------------------------------------


def test_matrices_and_the_rest_go_to_two_optimizers_that_step_as_one():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = Contender("two", "torch.optim.SGD", rest="torch.optim.AdamW").build(model, 1e-3)
    assert isinstance(optimizer, Together)
    sizes = {type(part).__name__: sum(p.numel() for g in part.param_groups for p in g["params"]) for part in optimizer.parts}
    assert sizes == {"SGD": 12, "AdamW": 9}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}
    before = [p.clone() for p in model.parameters()]
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    optimizer.zero_grad()
    assert all(moved) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_products_of_bf16_by_way_of_fp32_are_as_near_as_torchs_own(shape):
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2))
    halves = a.bfloat16(), b.mT.bfloat16()
    true = [x.double() for x in halves]
    square = torch.randn(shape[0], shape[0], dtype=torch.bfloat16)
    expected = [true[0] @ true[1], torch.addmm(square.double(), *true, beta=-4.775, alpha=2.0315)]
    with ProductsInFp32():
        found = [halves[0] @ halves[1], torch.addmm(square, *halves, beta=-4.775, alpha=2.0315)]
    for product, exact in zip(found, expected, strict=True):
        assert product.dtype == torch.bfloat16
        assert (product.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(found[0], (halves[0].float() @ halves[1].float()).bfloat16())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_muon_multiplies_in_fp32_on_a_processor_without_bf16(monkeypatch):
    seen = []

    class Seen(ProductsInFp32):
        def __enter__(self):
            seen.append(True)
            return super().__enter__()

    monkeypatch.setattr("reproduce.contenders.ProductsInFp32", Seen)
    for instructions in (False, True):
        monkeypatch.setattr("reproduce.contenders.multiplies_bf16", lambda device, has=instructions: has)
        model = torch.nn.Linear(4, 3)
        optimizer = Contender("muon", "torch.optim.Muon", rest="torch.optim.AdamW").build(model, 1e-3)
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        assert seen == [True]


def test_ours_is_built_with_the_optim_defaults_under_the_given_options():
    model = torch.nn.Linear(4, 3)
    optimizer = Contender("ours", "efcp_lowrank_mfac", {"window_size": 7}).build(model, 1e-3)
    expected = {**hf_efcp.optim_defaults("efcp_lowrank_mfac"), "window_size": 7}
    assert {name: getattr(optimizer.options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("efcp_lowrank_mfac", {"no_such": 1}, "c: unknown option 'no_such'"),
        ("torch.optim.AdamX", {}, "torch.optim.AdamX: "),
        ("galore_torch.GaLoreAdamW", {}, "pip install galore-torch"),
    ],
)
def test_a_contender_that_cannot_be_built_is_left_out_with_one_line(spec_file, capsys, monkeypatch, optimizer, options, message):
    monkeypatch.setitem(sys.modules, "galore_torch", None)  # as if it were not installed
    contender = {"optimizer": optimizer, "options": options}
    with pytest.raises(Unavailable, match=message):
        Contender("c", **contender).check()
    spec = run.usable(read_spec(spec_file(contenders={"adamw": ADAMW, "c": contender})))
    assert list(spec.families) == ["adamw"]
    printed = capsys.readouterr().out
    assert printed.startswith("left out: ") and message in printed and printed.count("\n") == 1


# A run --------------------------------------------------------------------------------------------------------------------


def test_a_run_records_losses_times_bytes_and_quality():
    task = get_task("digits_resnet", steps=25, batch_size=8, examples=32)
    record = training.train(task, Contender("adamw", "torch.optim.AdamW").build, 1e-3, seed=0)
    assert record["steps"] == [10, 20, 25] and record["diverged_at"] is None
    assert len(record["losses"]) == len(record["seconds"]) == 3 and record["seconds"] == sorted(record["seconds"])
    assert 0 < record["optimizer_seconds"] < record["train_seconds"]
    assert record["bytes_per_parameter"] == pytest.approx(8, abs=0.05)
    assert record["losses"][-1] < record["losses"][0]
    assert record["validation"].keys() == record["test"].keys() == {"loss", "accuracy"}


def test_all_contenders_see_the_same_weights_batches_and_dropout():
    """With a learning rate of 0 nothing but the seed is left, whatever random numbers an optimizer draws."""
    task = get_task("digits_vit", steps=4, batch_size=8, examples=8)
    adamw, ours = Contender("adamw", "torch.optim.AdamW"), Contender("ours", "efcp_lowrank_mfac")
    records = [training.train(task, build, 0.0, seed) for build, seed in ((adamw.build, 0), (ours.build, 0), (adamw.build, 1))]
    assert records[0]["losses"] == records[1]["losses"] != records[2]["losses"]
    assert records[0]["test"] == records[1]["test"] != records[2]["test"]


def test_the_learning_rate_grows_and_falls_to_zero():
    factors = [training.factor(step, 20, 0.1) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[-1] == pytest.approx(1 / 18)
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_a_divergence_is_recorded():
    task = get_task("digits_resnet", steps=20, batch_size=8, examples=8, warmup=0.0)
    record = training.train(task, Contender("sgd", "torch.optim.SGD").build, 1e30, seed=0)
    assert record["diverged_at"] in range(1, 20)
    assert record["validation"] is None and record["test"] is None
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("flag", ["--tasks", "--contenders"])
def test_a_name_that_the_spec_does_not_have_is_refused(flag, spec_file, tmp_path, capsys):
    path = spec_file()
    assert run.main([str(path), "--results", str(tmp_path / "results"), flag, "adamww"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {flag} adamww: {path.name} has ") and message.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_spec_for_gpus_says_that_there_is_none(spec_file, tmp_path, capsys):
    path = str(spec_file(device="cuda"))
    assert run.main([path, "--results", str(tmp_path)]) == 2
    assert "device: cuda, but torch" in capsys.readouterr().err
    assert run.main([path, "--results", str(tmp_path), "--list"]) == 0
    assert "adamw" in capsys.readouterr().out


def test_results_of_another_kind_of_device_are_refused(spec_file, tmp_path, capsys):
    folder, path = tmp_path / "results", spec_file()
    (wanted,) = read_spec(path).wanted({})
    write_result(folder, "small", {"key": wanted.key(), "label": "small", "gpu": "some GPU"})
    for command in (run.main, report.main):
        assert command([str(path), "--results", str(folder)]) == 2
        assert "1 of 1 results are of another kind of device" in capsys.readouterr().err


def test_a_worker_whose_run_failed_makes_no_other(spec_file, tmp_path, monkeypatch, capfd):
    """After an error of CUDA nothing more can run in its process. Here the pipe's end tells how many workers there were."""
    started = []
    context = run.multiprocessing.get_context("spawn")
    pipe = context.Pipe
    monkeypatch.setattr(type(context), "Pipe", lambda self: started.append(1) or pipe())
    broken = {"optimizer": "torch.optim.AdamW", "options": {"betas": [2.0, 0.9]}}
    path = str(spec_file(contenders={"a_broken": broken, "adamw": ADAMW}))
    assert run.main([path, "--results", str(tmp_path / "results"), "--processes", "1"]) == 1
    assert len(started) == 2 and "Invalid beta" in capfd.readouterr().err
    assert len(read_results(tmp_path / "results")) == 1


def test_a_command_makes_what_is_missing_and_repeats_nothing(spec_file, tmp_path, capfd):
    """Two runs side by side give what each gives alone; a torn last line is a run that is made again."""
    spec, folder = spec_file(seeds=[0, 1]), tmp_path / "results"
    command = [str(spec), "--results", str(folder), "--processes", "2"]
    assert run.main(command) == 0
    assert "[2 of 2, 0 h 00 min left]" in capfd.readouterr().out
    first = read_results(folder)
    assert len(first) == 2 and {r["threads"] for r in first.values()} == {1}
    adamw = Contender("adamw", "torch.optim.AdamW")
    for result in first.values():
        alone = training.train(get_task("digits_resnet", **SETTINGS), adamw.build, 1e-3, result["seed"])
        assert result["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    file = folder / "small.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-20])
    assert len(read_results(folder)) == 1
    assert run.main([*command, "--tasks", "small"]) == 0
    second = read_results(folder)
    assert second.keys() == first.keys()
    assert [second[k]["losses"] for k in first] == [first[k]["losses"] for k in first]
    capfd.readouterr()
    assert run.main([*command, "--list"]) == 0
    assert capfd.readouterr().out.strip() == ""


def test_the_later_of_two_results_counts(tmp_path):
    for value in (1, 2):
        write_result(tmp_path, "small", {"key": "a", "value": value})
    assert read_results(tmp_path) == {"a": {"key": "a", "value": 2}}
