"""Bad options, texts and parameters are refused before training, each with one clear error; good ones are not."""

import json
import warnings

import pytest
import torch
from torch.distributed.tensor import Shard

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.registry import get_optimizer_info, parse_optim_args
from tests.optim.bad_inputs import ANY, Bad, one, table
from tests.optim.helpers import M, started
from tests.reference import NAMES, known_to, make

# Options -----------------------------------------------------------------------------------------------------------------


def option(name, id_, message, optimizer=ANY, **given):
    return Bad(
        f"{name}: {id_}",
        lambda: hf_efcp.create_optimizer(optimizer, [one()], **{"lr": 0.1, **given}),
        message,
    )


OPTIONS = [
    option("name", "misspelt", "unknown option 'rnak'.*did you mean 'rank'.*valid: ", rnak=3),
    option("name", "misspelt window size", "'windowsize'.*did you mean 'window_size'", windowsize=3),
    option("name", "of another compressor", "unknown option 'density'.*valid: .*rank", density=0.1),
    option("name", "of another method", "unknown option 'damping'.*valid: .*eps", "efcp_dense_ggt", damping=0.1),
    option("name", "AdamW's betas", "unknown option 'betas'.*valid: ", betas=(0.9, 0.999)),
    option("lr", "negative", r"lr=-0\.1: must be a finite number >= 0", lr=-0.1),
    option("lr", "nan", "lr=nan: must be a finite number >= 0", lr=float("nan")),
    option("lr", "infinite", "lr=inf: must be a finite number >= 0", lr=float("inf")),
    option("lr", "none", "lr=None: a value is needed", lr=None),
    option("lr", "text", "lr='fast': expected a number", lr="fast"),
    option("lr", "true", "lr=True: expected a number", lr=True),
    option("lr", "a list", r"lr=\[0\.1\]: expected a number", lr=[0.1]),
    option("lr", "two elements", r"lr=.*: expected a number", lr=torch.ones(2)),
    option("weight_decay", "negative", r"weight_decay=-1.*: must be a finite number >= 0", weight_decay=-1),
    option("window_size", "zero", "window_size=0: must be an integer >= 1", window_size=0),
    option("window_size", "negative", "window_size=-4: must be an integer >= 1", window_size=-4),
    option("window_size", "a float", r"window_size=3\.5: expected an integer", window_size=3.5),
    option("window_size", "text", "window_size='many': expected an integer", window_size="many"),
    option("window_size", "true", "window_size=True: expected an integer", window_size=True),
    option("window_size", "none", "window_size=None: a value is needed", window_size=None),
    option("rank", "zero", "rank=0: must be an integer >= 1", rank=0),
    option("rank", "a float in text", r"rank='4\.0': expected an integer \(an integer >= 1\)", rank="4.0"),
    option("preset", "misspelt", "preset='papr': must be paper or measured; did you mean 'paper'", preset="papr"),
    option("maximize", "torch's", "unknown option 'maximize' for .*: negate the loss instead; valid:", maximize=True),
    option("power_iterations", "zero", "power_iterations=0: must be an integer >= 1", power_iterations=0),
    option("density", "zero", r"density=0.*: must be a number in \(0, 1\]", "efcp_sparse_mfac", density=0),
    option("density", "a percentage", r"density=5.*: must be a number in \(0, 1\]", "efcp_sparse_ggt", density=5),
    option("density", "nan", r"density=nan: must be a number in \(0, 1\]", "efcp_sparse_ggt", density="nan"),
    option(
        "block_size", "above int16", r"block_size=32769: must be an integer in \[1, 32768\]", "efcp_sparse_mfac", block_size=32769
    ),
    option("block_size", "zero", r"block_size=0: must be an integer in \[1, 32768\]", "efcp_sparse_mfac", block_size=0),
    option("damping", "zero", "damping=0.*: must be a finite number > 0", damping=0),
    option("damping", "negative", "damping=-1.*: must be a finite number > 0", damping=-1),
    option("damping", "infinite", "damping=inf: must be a finite number > 0", damping=float("inf")),
    option("damping", "complex", "damping=.*: expected a number", damping=1j),
    option("damping_mode", "misspelt", "damping_mode='relativ': must be absolute or relative", damping_mode="relativ"),
    option("damping_mode", "a number", "damping_mode=1: expected text", damping_mode=1),
    option("divisor", "a number", "divisor=10: expected text", divisor=10),
    option("divisor", "unknown", "divisor='m': must be window or filled", divisor="m"),
    option("eps", "zero", "eps=0.*: must be a finite number > 0", "efcp_dense_ggt", eps=0),
    option("beta1", "one", r"beta1=1.*: must be a number in \[0, 1\)", "efcp_dense_ggt", beta1=1),
    option("beta2", "zero", r"beta2=0.*: must be a number in \(0, 1\]", "efcp_dense_ggt", beta2=0),
    option("beta2", "above one", r"beta2=1\.5: must be a number in \(0, 1\]", "efcp_dense_ggt", beta2=1.5),
    option(
        "beta1",
        "and window_momentum",
        "beta1=0.9.*window_momentum=0.5.*one of them",
        "efcp_dense_ggt",
        beta1=0.9,
        window_momentum=0.5,
    ),
    option("window_momentum", "one", r"window_momentum=1.*: must be a number in \[0, 1\)", window_momentum=1),
    option("momentum", "negative", r"momentum=-0\.1: must be a number in \[0, 1\)", momentum=-0.1),
    option("scope", "unknown", "scope='tensor': must be model or layer", scope="tensor"),
    option("scope", "none", "scope=None: a value is needed", scope=None),
    option("update_rms", "zero", "update_rms=0.*: must be a number > 0, or none", update_rms=0),
    option("update_rms", "text", "update_rms='auto': expected a number or none", update_rms="auto"),
    option("weight_decay_mode", "unknown", "weight_decay_mode='adamw': must be decoupled or l2", weight_decay_mode="adamw"),
    option("window_dtype", "int8", "window_dtype='int8': expected one of .*bf16.*or none", window_dtype="int8"),
    option(
        "window_dtype", "fp16", "window_dtype=torch.float16: must be float64 or float32 or bfloat16", window_dtype=torch.float16
    ),
    option(
        "error_dtype",
        "an integer dtype",
        "error_dtype=torch.int8: must be float64 or float32 or bfloat16",
        error_dtype=torch.int8,
    ),
    option("error_dtype", "a number", "error_dtype=16: expected one of .* or none", error_dtype=16),
    Bad(
        "optimizer: unknown",
        lambda: hf_efcp.create_optimizer("adamw", [one()], lr=0.1),
        "unknown optimizer 'adamw'.*valid: efcp_",
    ),
    Bad(
        "optimizer: misspelt",
        lambda: hf_efcp.create_optimizer("efcp_lowrank_mfca", [one()], lr=0.1),
        "did you mean 'efcp_lowrank_mfac'",
    ),
    Bad("lr: missing", lambda: hf_efcp.create_optimizer(ANY, [one()]), "lr", (OptionError, TypeError)),
    Bad("options: positional", lambda: hf_efcp.LowRankMFAC([one()], 0.1, 32), "positional", TypeError),
    Bad(
        "class: misspelt option",
        lambda: hf_efcp.SparseGGT([one()], 0.1, densty=0.1),
        "'densty' for SparseGGT: did you mean 'density'",
    ),
    Bad(
        "window_dtype: fp16 is not offered",
        lambda: _message_without("fp16", window_dtype="int8"),
        "expected one of",
    ),
]


def _message_without(word, **given):
    try:
        make(ANY, [one()], **given)
    except OptionError as error:
        assert word not in str(error), str(error)
        raise


# Texts of --optim_args ---------------------------------------------------------------------------------------------------


def text(id_, value, message, error=OptionError):
    return Bad(f"optim_args: {id_}", lambda: get_optimizer_info(ANY).check(parse_optim_args(value)), message, error)


TEXTS = [
    text("no value", "rank", "'rank' is not of the form name=value"),
    text("empty value", "rank=,window_size=3", "'rank=' is not of the form name=value"),
    text("no name", "=3", "'=3' is not of the form name=value"),
    text("twice", "rank=3,rank=4", "'rank' is given twice"),
    text("semicolon", "rank=3;window_size=4", "name=value, with commas between them: rank=3,window_size=4$"),
    text("space", "scope=model,rank = 3 window_size=4", "name=value, with commas between them: rank=3,window_size=4$"),
    text("line break", "rank=3\nwindow_size=4", "with commas between them: rank=3,window_size=4$"),
    text("semicolon at the end", "rank=3;", "with commas between them: rank=3$"),
    text("two signs", "rank==3", "name=value, with commas between them: rank=3$"),
    text("AdamW's name of lr", "learning_rate=1e-3", "unknown option 'learning_rate'.*did you mean 'lr'"),
    text("misspelt", "rnak=3", "unknown option 'rnak'.*did you mean 'rank'"),
    text("quotes", "rank='3'", "rank=.*: expected an integer"),
    text("broken JSON", '{"rank": 4', "not valid JSON"),
    text("JSON null", '{"rank": null}', "rank=None: a value is needed"),
    text("JSON nested", '{"rank": {"a": 1}}', r"rank=\{'a': 1\}: expected an integer"),
    text("JSON twice", '{"rank": 3, "rank": 4}', "'rank' is given twice"),
    text("JSON list", '["rank", 4]', r"""not of the form name=value"""),
    text("python dict", "{'rank': 4}", "not valid JSON"),
]


# Parameters --------------------------------------------------------------------------------------------------------------


def params(id_, make_params, message, error=OptionError):
    return Bad(f"parameters: {id_}", lambda: make(ANY, make_params()), message, error)


def flagged(**attributes):
    p = one(3, 4)
    for key, value in attributes.items():
        setattr(p, key, value)
    return p


def shared_between_groups():
    p = one()
    return [{"params": [p]}, {"params": [one(2), p]}]


PARAMETERS = [
    params("none", lambda: None, "params|NoneType", TypeError),
    params("empty", list, "empty parameter list", ValueError),
    params("a tensor", lambda: one(), "iterable", TypeError),
    params("a set in a group", lambda: [{"params": {one()}}], "ordered|set", TypeError),
    params("a number", lambda: [3.0], "can only optimize Tensors", TypeError),
    params("a module", lambda: torch.nn.LayerNorm(2), "params is a LayerNorm: pass model.parameters()", TypeError),
    params("a method", lambda: torch.nn.LayerNorm(2).parameters, "params is a method: pass model.parameters()", TypeError),
    params("a state dict", lambda: torch.nn.LayerNorm(2).state_dict(), r"params is a OrderedDict: .*its items\(\)", TypeError),
    params("a module in a group", lambda: [{"params": torch.nn.LayerNorm(2)}], "params is a LayerNorm", TypeError),
    params("sparse", lambda: [torch.nn.Parameter(torch.ones(2, 3).to_sparse())], "sparse_coo parameters: pass a dense one"),
    params("compressed rows", lambda: [torch.nn.Parameter(torch.ones(2, 3).to_sparse_csr())], "sparse_csr parameters"),
    params("group with learning_rate", lambda: [{"params": [one()], "learning_rate": 1}], "did you mean 'lr'"),
    params("group with wd", lambda: [{"params": [one()], "wd": 1}], "did you mean 'weight_decay'"),
    params("group with Lr", lambda: [{"params": [one()], "Lr": 1}], "did you mean 'lr'"),
    params("group with a misspelt option", lambda: [{"params": [one()], "rnak": 8}], "unknown key 'rnak'.*did you mean 'rank'"),
    params("numbers among tensors", lambda: [one(), 3.0], "can only optimize Tensors", TypeError),
    params("no leaf", lambda: [one() * 2], "non-leaf", ValueError),
    params("complex", lambda: [one(dtype=torch.complex64)], "view_as_real.*complex64"),
    params("complex in a group", lambda: [{"params": [one()]}, {"params": [one(dtype=torch.complex128)]}], "complex128"),
    params("complex with a name", lambda: [("a", one()), ("b", one(dtype=torch.complex64))], "complex64"),
    params("in two groups", shared_between_groups, "more than one parameter group", ValueError),
    params("some with names", lambda: [("a", one()), one()], "name", ValueError),
    params("flat FSDP1", lambda: [flagged(_is_flat_param=True)], "FSDP2|fully_shard"),
    params("piece of FSDP1", lambda: [flagged(_fsdp_flattened=True)], "FSDP2|fully_shard"),
    params("sharded", lambda: [flagged(device_mesh=object(), placements=(Shard(1),))], r"DTensor placed as \(Shard\(dim=1\)\)"),
    params("group with an option", lambda: [{"params": [one()], "rank": 8}], "rank is an option of the whole optimizer"),
    params("group with window_size", lambda: [{"params": [one()], "window_size": 8}], "window_size is an option of the whole"),
    params("group with a typo", lambda: [{"params": [one()], "weight_decy": 0.1}], "'weight_decy'.*did you mean 'weight_decay'"),
    params("group with a negative lr", lambda: [{"params": [one()], "lr": -1}], r"lr=-1.*: must be a finite number >= 0"),
    params("group with a bad decay", lambda: [{"params": [one()], "weight_decay": "x"}], "weight_decay='x': expected a number"),
    params("group without params", lambda: [{"lr": 0.1}], "params", (OptionError, KeyError)),
    params("group that is none", lambda: [{"params": [one()]}, [one()]], "dict", TypeError),
    Bad(
        "model without parameters",
        lambda: hf_efcp.create_optimizer(ANY, torch.nn.ReLU(), lr=0.1),
        "empty parameter list",
        ValueError,
    ),
]


@table(OPTIONS + TEXTS + PARAMETERS)
def test_refused_before_training(bad):
    state = torch.get_rng_state()
    with pytest.raises(bad.error, match=bad.message) as caught:
        bad.give()
    assert len(str(caught.value).splitlines()) == 1, "one line"
    assert torch.equal(torch.get_rng_state(), state)


def test_every_optimizer_refuses_what_is_not_its_own():
    for name in NAMES:
        for given in ({"nonsense": 1}, {"window_size": 0}, {"lr": -1.0}, {"scope": "x"}):
            with pytest.raises(OptionError, match=next(iter(given))):
                hf_efcp.create_optimizer(name, [one()], **{"lr": 0.1, **given})


# The other way round: what must be accepted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("rank=4,window_size=32", {"rank": 4, "window_size": 32}),
        (" rank = 4 , window_size=32, ", {"rank": 4, "window_size": 32}),
        ('{"rank": 4, "update_rms": null}', {"rank": 4, "update_rms": None}),
        ("update_rms=none,damping=1e-3", {"update_rms": None, "damping": 1e-3}),
        ("window_dtype=bf16", {"window_dtype": torch.bfloat16}),
        ("window_dtype=torch.float32,error_dtype=None", {"window_dtype": torch.float32, "error_dtype": None}),
        ("", {}),
        (None, {}),
        ({"rank": "4"}, {"rank": 4}),
        (json.dumps({"rank": 2}), {"rank": 2}),
    ],
    ids=str,
)
def test_good_texts(given, expected):
    assert get_optimizer_info(ANY).check(parse_optim_args(given)) == expected


def test_good_inputs_warn_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            expected = known_to(name, {"window_size": M, "rank": 3, "update_rms": 0.1})
            optimizer, _ = started(name, lr="1e-3", weight_decay=0, **{option: str(value) for option, value in expected.items()})
            optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.param_groups[0]["lr"] == 1e-3
            assert {option: getattr(optimizer.options, option) for option in expected} == expected
