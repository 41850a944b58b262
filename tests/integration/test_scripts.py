"""Scripts that never mention hf_efcp: they train, save and resume under the runner as with any built-in optimizer."""

import json
import os
import random
import statistics
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from hf_efcp import list_optimizers
from hf_efcp.registry import get_optimizer_info
from tests.optim.helpers import same
from tests.reference import names

SCRIPTS = Path(__file__).parent / "scripts"
STEPS, SAVED = 40, 16
COMMON = {
    "model_name_or_path": "model",
    "cache_dir": "cache",
    "output_dir": "out",
    "do_train": True,
    "do_eval": True,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": STEPS,
    "save_steps": SAVED,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
}
# 96 examples are 12 batches of 8: the checkpoint lies inside an epoch, and after the window has wrapped around.
RUNS = {
    "glue_like": {"optim": "efcp_lowrank_mfac", "optim_args": "rank=2,window_size=6", "gradient_accumulation_steps": 2},
    "qa_like": {"optim": "efcp_sparse_mfac", "optim_args": "density=0.05,window_size=6"},
    "clm_like": {"optim": "efcp_lowrank_ggt", "optim_args": "rank=2,window_size=6", "bf16": True},
    # The collator's random masks are drawn ahead of the random state that is saved: they repeat only after a whole epoch.
    "mlm_like": {
        "optim": "efcp_sparse_ggt",
        "optim_args": {"density": 0.05, "window_size": 6},
        "per_device_train_batch_size": 6,
        "mlm_probability": 0.3,
    },
}
every_script = pytest.mark.parametrize("script", [SCRIPTS / f"{name}.py" for name in RUNS], ids=list(RUNS))


def tokenizer():
    """One token a letter; [CLS] and [SEP] as BERT has them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *string.ascii_letters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=["input_ids", "attention_mask"], **names)


def save_model(script, folder):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = {**sizes, "vocab_size": 64, "max_position_embeddings": 32, "initializer_range": 0.15}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if script == "clm_like":
            model = LlamaModel(LlamaConfig(**common, num_key_value_heads=1, pad_token_id=0))
        else:
            dropout = 0.1 if script == "qa_like" else 0.0
            model = BertModel(BertConfig(**common, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_data(script, folder):
    """train and validation files of 96 and 32 examples; returns the arguments that name them."""
    write, kind = {"glue_like": (sentences, "csv"), "qa_like": (questions, "json")}.get(script, (lines, "txt"))
    generator = random.Random(0)
    for name, count in (("train", 96), ("validation", 32)):
        (folder / f"{name}.{kind}").write_text(write(generator, count))
    return {"train_file": f"train.{kind}", "validation_file": f"validation.{kind}"}


def sentences(generator, count):
    """csv: the label says from which half of the alphabet the letters come."""
    halves = {"early": "abcdefghijklm", "late": "nopqrstuvwxyz"}
    rows = [(label, generator.choices(halves[label], k=generator.randint(4, 8))) for label in list(halves) * (count // 2)]
    return "\n".join(["sentence,label", *(f"{' '.join(letters)},{label}" for label, letters in rows)]) + "\n"


def questions(generator, count):
    """json: the answer is the two capital letters among small ones."""
    rows = []
    for _ in range(count):
        letters = generator.choices(string.ascii_lowercase, k=8)
        answer = f"{generator.choice('ABCD')} {generator.choice('WXYZ')}"
        letters.insert(generator.randint(0, 8), answer)
        context = " ".join(letters)
        rows.append({"question": "Q", "context": context, "answer": answer, "answer_start": context.index(answer)})
    return json.dumps({"data": rows})


def lines(generator, count):
    """Text: the first or the second half of the alphabet, from one of its first three letters on."""
    starts = [13 * generator.randrange(2) + generator.randrange(3) for _ in range(count)]
    return "".join(" ".join(string.ascii_lowercase[i : i + 10]) + "\n" for i in starts)


@pytest.fixture
def prepare(tmp_path):
    """Write a script's model and data to tmp_path; returns its arguments."""

    def write(script):
        save_model(script, tmp_path / "model")
        return {**COMMON, **write_data(script, tmp_path), **RUNS[script]}

    return write


def command(script, arguments):
    """The script's path and its arguments, as on a command line."""
    texts = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in arguments.items()}
    return [str(SCRIPTS / f"{script}.py"), *(part for name, text in texts.items() for part in (f"--{name}", text))]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def steps(folder):
    """What was logged at each training step."""
    return [entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def results(folder):
    """The metrics of the evaluation, without the timings."""
    metrics = json.loads((folder / "eval_results.json").read_text())
    return {name: value for name, value in metrics.items() if "runtime" not in name and "per_second" not in name}


def differences(a, b, where="optimizer.pt"):
    """Places where nested containers differ; tensors are compared bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{where}[{key!r}]")]
    equal = same(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if equal else [where]


@pytest.mark.parametrize("script", [s if s == "glue_like" else pytest.param(s, marks=pytest.mark.slow) for s in RUNS])
def test_train_and_resume_in_a_fresh_process(script, run, prepare, tmp_path, python, monkeypatch):
    arguments = prepare(script)
    assert run(command(script, arguments)) == 0

    resumed = {**arguments, "output_dir": "again", "resume_from_checkpoint": f"out/checkpoint-{SAVED}"}
    argv = command(script, resumed)
    if script == "mlm_like":
        (tmp_path / "config.json").write_text(json.dumps(resumed))
        argv[1:] = ["config.json"]
    if script == "clm_like":
        monkeypatch.setenv("PYTHONPATH", str(SCRIPTS), prepend=os.pathsep)
        argv[:1] = ["-m", script]
    done = python("-m", "hf_efcp.run", *argv)
    assert done.returncode == 0, done.stderr

    out, again = tmp_path / "out", tmp_path / "again"
    losses = [entry["loss"] for entry in steps(out)]
    assert len(losses) == STEPS
    assert statistics.mean(losses[-5:]) < 0.7 * statistics.mean(losses[:5])
    # The second run wrote all that the first one did, from where it started.
    assert files(again) == [name for name in files(out) if f"checkpoint-{SAVED}/" not in name]
    assert steps(again) == steps(out)
    assert results(again) == results(out)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    states = [torch.load(folder / f"checkpoint-{STEPS}/optimizer.pt", weights_only=True) for folder in (out, again)]
    assert states[0]["efcp"]["class"] == get_optimizer_info(arguments["optim"]).cls.__name__
    assert differences(*states) == []


@pytest.mark.parametrize("name", names(windowed=False))
def test_methods_without_a_window_train_and_resume(name, run, prepare, tmp_path):
    arguments = {**prepare("glue_like"), "optim": name, "optim_args": "beta2=0.99", "max_steps": 4, "save_steps": 2}
    assert run(command("glue_like", arguments)) == 0
    resumed = {**arguments, "output_dir": "again", "resume_from_checkpoint": "out/checkpoint-2"}
    assert run(command("glue_like", resumed)) == 0
    assert steps(tmp_path / "again") == steps(tmp_path / "out")
    states = [torch.load(tmp_path / folder / "checkpoint-4/optimizer.pt", weights_only=True) for folder in ("out", "again")]
    assert states[0]["efcp"]["class"] == get_optimizer_info(name).cls.__name__
    assert differences(*states) == []


def test_training_args_bin_loads_where_hf_efcp_is_not_imported(run, prepare, python):
    arguments = {**prepare("glue_like"), "max_steps": 1, "do_eval": False}
    assert run(command("glue_like", arguments)) == 0
    load = "torch.load('out/training_args.bin', weights_only=False)"
    done = python("-c", f"import sys, torch, transformers; assert 'hf_efcp' not in sys.modules; print({load}.optim.value)")
    assert (done.returncode, done.stdout) == (0, "efcp_lowrank_mfac\n"), done.stderr


@every_script
@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), (["--optim", "efcp_lowrank"], 2)], ids=["help", "unknown name"])
def test_help_and_errors_list_our_names(script, argv, status, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run([str(script), *argv])
    assert stop.value.code == status
    text = "".join(capsys.readouterr())
    assert all(name in text for name in list_optimizers())


@every_script
@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("efcp_lowrank_ggt", "rank=0", "error: rank=0: must be an integer >= 1\n"),
        ("efcp_sparse_mfac", "density=2", "error: density=2.0: must be a number in (0, 1]\n"),
    ],
)
def test_a_bad_option_is_one_line_and_writes_nothing(script, optim, optim_args, message, run, capsys, tmp_path):
    arguments = {**COMMON, "train_file": "no.csv", "validation_file": "no.csv", "optim": optim, "optim_args": optim_args}
    assert run(command(script.stem, arguments)) == 2
    assert capsys.readouterr() == ("", message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_the_scripts_know_nothing_of_us(path):
    assert "efcp" not in path.read_text()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"optim_args": "rank=3,window_size=6"}, "checkpoint was made with rank=2, this optimizer has rank=3"),
        ({"optim": "efcp_lowrank_ggt"}, "checkpoint is of LowRankMFAC, this optimizer is LowRankGGT"),
    ],
    ids=["options", "optimizer"],
)
def test_resuming_as_something_else_is_one_line(other, message, run, prepare, capsys):
    arguments = {**prepare("glue_like"), "max_steps": 1, "do_eval": False}
    assert run(command("glue_like", arguments)) == 0
    resumed = {**arguments, **other, "max_steps": 2, "resume_from_checkpoint": "out/checkpoint-1"}
    assert run(command("glue_like", resumed)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
