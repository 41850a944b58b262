"""recipes/local_updates.py: one worker in this process; several, one of which dies, by hand."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.recipes.helpers import RECIPES, write_csv


@pytest.fixture
def recipe(tmp_path, tiny_model):
    """The recipe, and its flags for a short run on local files."""
    import local_updates

    files = [f"--train_file={write_csv(tmp_path / 'train.csv', 48)}", f"--validation_file={write_csv(tmp_path / 'dev.csv', 12)}"]
    flags = [*files, f"--model_name_or_path={tiny_model}", "--max_steps=6", "--batch_size=6", "--output=out/local"]
    return local_updates, flags


def test_it_trains_counts_and_draws(recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    module, flags = recipe
    runs = ["ddp", "lordo:sync_every=2,rank=4", "diloco:sync_every=3", "local:optim=efcp_ldadamw,rank=4,sync_every=2"]
    results = module.main(["--runs", *runs, *flags, "--num_processes=1", "--plot=out/local.png"])
    assert [r["rounds"] for r in results] == [0, 3, 2, 3]
    assert all(len(r["losses"]) == 6 and r["eval_samples"] == 12 for r in results)
    page = (tmp_path / "out/local.md").read_text()
    assert all(f"| `{run}` |" in page for run in runs)
    assert (tmp_path / "out/local.png").stat().st_size > 5000
    assert capsys.readouterr().out.count("trained\n") == 4
    again = module.main(["--runs", *runs, *flags, "--num_processes=1"])  # nothing is repeated
    assert again == results and "trained\n" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["dpp"], "unknown run 'dpp': valid: ddp, local, diloco, lordo"),
        (["lordo:sync_every=0"], "sync_every=0: must be an integer >= 1"),
        (["lordo:rnk=3"], "did you mean 'rank'"),
        (["ddp:sync_every=3"], "ddp has no options of local updates"),
        (["ddp", "--batch_size=7"], "must be a multiple of --num_processes 2"),
    ],
)
def test_mistakes_end_in_one_line(runs, message, capsys):
    import local_updates

    with pytest.raises(SystemExit):
        local_updates.main(["--runs", *runs])
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_three_workers_of_which_one_dies(recipe, tmp_path):
    _, flags = recipe
    command = [sys.executable, str(RECIPES / "local_updates.py"), "--runs", "lordo:sync_every=2,rank=4", *flags]
    command += ["--num_processes=3", "--min_workers=2", "--kill_at_step=3", "--worker_timeout=40"]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out/local.json").read_text())
    assert (result["workers_left"], result["rounds"], len(result["losses"])) == (2, 3, 6)


@pytest.mark.slow
def test_finished_runs_survive_the_end_of_the_program_and_its_workers_do_not(recipe, tmp_path):
    _, flags = recipe
    command = [sys.executable, str(RECIPES / "local_updates.py"), "--runs", "ddp", "lordo:sync_every=2,rank=4", *flags]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "--seeds", *map(str, range(99))], env=environment, start_new_session=True) as process:
        file, end = tmp_path / "out/local.json", time.monotonic() + 300
        while not file.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        process.terminate()
        assert process.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        for _ in range(60):
            os.killpg(process.pid, 0)
            time.sleep(0.5)
    there = json.loads(file.read_text())
    assert [r["run"] for r in there][:1] == ["ddp"] and len(there) < 9
