"""`hf-efcp bench`: what it writes and says, what does not fit, and what it refuses."""

import json
import time

import pytest
import torch

from hf_efcp.bench import command as bench
from hf_efcp.bench import measuring, peers, reporting
from hf_efcp.cli.common import chosen
from hf_efcp.cli.main import main
from hf_efcp.options import OptionError
from tests.bench.helpers import CPU, LIST, phases_of, started
from tests.cli.helpers import assert_one_line_of_error, write_shapes, written
from tests.reference import NAMES, args_known_to, known_to


@pytest.fixture
def shape_file(tmp_path):
    return str(write_shapes(tmp_path, LIST))


def test_all_optimizers_and_torchs_in_one_run(tmp_path, shape_file, monkeypatch, capfd):
    mine = {name: entry for name, entry in peers.PEERS.items() if entry[0] == "torch"}
    broken = {"absent": ("no-such-package", None), "broken": ("torch", lambda model, m: 1 / 0)}
    monkeypatch.setattr(peers, "PEERS", mine | broken)
    monkeypatch.setattr(bench, "PEERS", mine | broken)
    monkeypatch.setattr(reporting, "PEERS", mine | broken)
    flags = ["--steps", "2", "--warmup", "1", "--quick", "--peers", "--device", "cpu", "--threads", "1"]
    found = written("bench", tmp_path, shape_file, "--optim_args", "window_size=8", *flags)
    assert set(found["optimizers"]) == {*NAMES, *mine}
    assert found["skipped"] == {
        "absent": "not installed: pip install no-such-package",
        "broken": "raised ZeroDivisionError: division by zero",
    }
    assert found["machine"]["threads"] == 1 and found["machine"]["cpu"] and found["machine"]["torch"] == torch.__version__
    assert torch.__version__.startswith(found["versions"]["torch"])  # the package's may not tell the build
    rates = found["rates"]
    assert set(rates) == {"bandwidth", "copy_bytes", "scale_bytes", "fp32_flops", "fp64_flops"}
    assert rates["bandwidth"]["max"] == max(rates["copy_bytes"]["max"], rates["scale_bytes"]["max"])
    for name in NAMES:
        entry = found["optimizers"][name]
        assert known_to(name, {"window_size": 8}).items() <= entry["options"].items()
        assert {phase for phase, time in entry["phases_ms"].items() if time > 0} - {"rest"} == set(phases_of(name))
        assert set(entry["phases_ms"]) == set(entry["phase_share"]) == set(measuring.PHASES)
        assert sum(entry["phase_share"].values()) == pytest.approx(1)
        assert entry["step_ms"]["min"] <= entry["step_ms"]["median"] <= entry["step_ms"]["max"]
        assert entry["ratio"] == pytest.approx(entry["step_ms"]["median"] / entry["roofline"]["ms"])
        assert entry["bytes"] == started(name, args_known_to(name, "window_size=8"))[0].memory_footprint()
        assert entry["peak_bytes"] == 8 * found["parameters"] + entry["total"] + entry["temporaries"]
    assert "ratio" in found["optimizers"]["torch AdamW fused"] and "ratio" not in found["optimizers"]["torch Adafactor"]
    said = capfd.readouterr()
    assert all(line.startswith("[bench] ") for line in said.err.splitlines())  # nothing of the profiler's
    assert all(f"| {name} " in said.out for name in (*NAMES, *mine))
    rows = {row.split("|")[1].strip(): row for row in said.out.splitlines() if row.startswith("|")}
    assert "pip install no-such-package" in rows["absent"] and "ZeroDivisionError" in rows["broken"]


def test_cpu_time_is_no_more_than_wall_time():
    found = []
    for on in (True, False):
        with measuring.cpu_time(on):
            found.append(measuring.seconds(lambda: time.sleep(0.05), CPU))
    assert found[0] < 0.04 <= 0.05 <= found[1]


def test_what_does_not_fit_is_left_out_or_waits(shape_file, capsys):
    assert main(["bench", shape_file, "--steps", "1", "--warmup", "0", "--quick", "--memory", "80kB"]) == 0
    out = capsys.readouterr().out
    assert "skipped: efcp_dense_ggt: its state of" in out
    assert "By turns ran: " in out


def test_low_precision_and_tied_parameters():
    model = torch.nn.Module()
    model.a = torch.nn.Linear(8, 8, bias=False, device="meta", dtype=torch.bfloat16)
    model.b = torch.nn.Linear(8, 8, bias=False, device="meta", dtype=torch.bfloat16)
    model.b.weight = model.a.weight
    found = bench.bench(model, chosen("efcp_sparse_mfac", None), CPU, steps=1, warmup=0, quick=True)
    assert (found["parameters"], found["dtype"]) == (64, "bfloat16")
    assert model.b.weight is model.a.weight and model.a.weight.grad.dtype == torch.bfloat16


BAD = {
    (): "MODEL is missing",
    ("nosuch",): "unknown model 'nosuch'",
    ("minilm", "--steps", "0"): "steps=0",
    ("minilm", "--warmup", "-1"): "warmup=-1",
    ("minilm", "--threads", "0"): "threads=0",
    ("minilm", "--device", "tpu"): "device='tpu'",
    ("minilm", "--cpu_time", "--threads", "2"): "cpu_time: it is that of one CPU thread",
    ("minilm", "--optim", "efcp_lowrank"): "did you mean 'efcp_lowrank_",
    ("minilm", "--memory", "much"): "'much'",
    ("minilm", "--plot", "x.txt"): "must be a .png, .svg or .pdf",
    ("--sweep", "--sweep_windows", "a"): "sweep_windows='a'",
    ("minilm", "--sweep"): "shapes of its own",
    ("--sweep", "--sweep_parameters", "0"): "sweep_parameters='0'",
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_bad_input_is_one_line(flags, capsys):
    threads = torch.get_num_threads()
    assert_one_line_of_error(capsys, BAD[flags], "bench", *flags)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said(capsys):
    assert_one_line_of_error(capsys, "no CUDA device", "bench", "minilm", "--device", "cuda")


def test_peers_are_chosen_by_words():
    assert peers.named("all") == [name for name in peers.PEERS if name != "ista-daslab SparseMFAC"]
    assert peers.named("sparsemfac") == ["ista-daslab SparseMFAC"]  # its kernels can end the process
    assert peers.named("SOAP, torch muon") == ["torch Muon", "pytorch-optimizer SOAP"]
    with pytest.raises(OptionError, match="peers='sopa': no peer has this in its name; did you mean 'soap'"):
        peers.named("sopa")


def test_a_model_behind_peers_is_taken_for_a_word(capsys):
    assert_one_line_of_error(capsys, "write MODEL before --peers", "bench", "--peers", "minilm")


def test_torchs_muon_is_a_peer(shape_file, capsys):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    assert (
        main(["bench", shape_file, "--optim", NAMES[0], "--steps", "1", "--quick", "--device", "cpu", "--peers", "torch muon"])
        == 0
    )
    rows = [row.split("|")[1].strip() for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert rows[1:3] == [NAMES[0], "torch Muon"]


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_that_is_cut_short_prints_what_it_has(at, tmp_path, shape_file, monkeypatch, capsys):
    """Ctrl-C in the `at`-th step of a peer: at 1 nothing is timed, at 3 its and our first step are."""

    class Interrupted(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            if self.steps == at:
                raise KeyboardInterrupt
            super().step(closure)

    monkeypatch.setitem(peers.PEERS, "torch stopped", ("torch", lambda model, m: Interrupted(model.parameters(), lr=0.1)))
    file = tmp_path / "bench.json"
    command = ["bench", shape_file, "--optim", NAMES[0], "--steps", "4", "--warmup", "0", "--quick", "--device", "cpu"]
    command += ["--peers", "stopped", "--json", str(file)]
    if at == 1:
        with pytest.raises(KeyboardInterrupt):
            main(command)
        assert not file.exists()
        return
    assert main(command) == 130
    found = json.loads(file.read_text())
    assert found["cut_short"] and set(found["optimizers"]) == {NAMES[0], "torch stopped"}
    printed = capsys.readouterr().out
    assert f"| {NAMES[0]} " in printed and "was cut short" in printed
