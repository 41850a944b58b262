"""FSDP2 under Trainer, with a script that knows nothing of hf_efcp: divided parameters, saved and resumed."""

import re

import pytest

from tests.distributed.fsdp2 import runs_models
from tests.integration.conftest import CHECKOUT
from tests.integration.test_scripts import SAVED, steps

LAUNCH = ["accelerate.commands.launch", "--config_file", str(CHECKOUT / "recipes/configs/fsdp2.yaml"), "--num_processes", "2"]
FULL = [*LAUNCH, "--fsdp_state_dict_type", "FULL_STATE_DICT"]
# Bytes with which two and three processes choose differently.
BUDGET = 250_000
RUNNER = "tests.integration.fsdp_on_cpu"
pytestmark = runs_models


def test_trainer_saves_and_resumes_bit_for_bit(launch, arguments, tmp_path):
    """With a state dict that is gathered on the first process, `--fsdp`'s default: sparse indices have to be sent."""
    arguments |= {"optim": "efcp_sparse_mfac", "optim_args": "density=0.1,window_size=20,window_momentum=0.5"}
    launch(FULL, arguments, module=RUNNER)
    out = tmp_path / "out"
    losses = [entry["loss"] for entry in steps(out)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert (out / f"checkpoint-{SAVED}/optimizer.bin").is_file()
    assert not (out / f"checkpoint-{SAVED}/efcp_optim").exists()

    # The options are the checkpoint's, as they would be after a change of the defaults. The first process says so.
    again = {**arguments, "output_dir": "again", "resume_from_checkpoint": str(out / f"checkpoint-{SAVED}")}
    said = launch(FULL, {**again, "optim_args": "window_size=20"}, module=RUNNER)
    assert re.findall("options from the checkpoint: .*", said) == [
        "options from the checkpoint: window_momentum=0.5, density=0.1"
    ]
    assert steps(tmp_path / "again") == steps(out)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
def test_accelerate_launch_with_sharded_checkpoints(name, launch, arguments, tmp_path):
    arguments |= {"optim": name, "optim_args": "update_rms=0.5"}
    for output, more in (("out", {}), ("again", {"resume_from_checkpoint": str(tmp_path / f"out/checkpoint-{SAVED}")})):
        launch(LAUNCH, {**arguments, **more, "output_dir": output}, module=RUNNER)
    files = {path.name for path in (tmp_path / f"out/checkpoint-{SAVED}/optimizer_0").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert steps(tmp_path / "again") == steps(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [LAUNCH, FULL], ids=["sharded", "full"])
def test_a_budget_is_spent_as_in_the_run_that_was_saved(launcher, launch, arguments, tmp_path):
    """Three processes would choose a longer window than the two that have saved."""
    three = [*launcher]
    three[three.index("--num_processes") + 1] = "3"
    arguments |= {"optim": "efcp_lowrank_mfac", "optim_args": f"update_rms=0.5,memory_budget={BUDGET}"}
    said = [launch(which, {**arguments, "output_dir": out}, module=RUNNER) for which, out in ((launcher, "two"), (three, "out"))]
    two, three_alone = (re.search(r"memory_budget=.*?: (window_size=.*?): .* for each process", text)[1] for text in said)
    assert two != three_alone
    again = {**arguments, "output_dir": "again", "resume_from_checkpoint": str(tmp_path / f"two/checkpoint-{SAVED}")}
    assert "for each process" not in launch(three, again, module=RUNNER)  # nothing is chosen
    assert len(steps(tmp_path / "again")) == len(steps(tmp_path / "two"))
