"""The metric's options: bad values and combinations are refused with one clear line; good ones are taken, from text too."""

import pytest
import torch

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.registry import get_optimizer_info, parse_optim_args
from tests.optim.bad_inputs import Bad, one, table
from tests.reference import names

GGT, MFAC = names(family="ggt"), names(family="mfac")


def option(message, name=MFAC[0], **given):
    id_ = ",".join(f"{key}={value!r}" for key, value in given.items())
    return Bad(id_, lambda: hf_efcp.create_optimizer(name, [one(3, 4)], lr=0.1, **given), message)


BAD = [
    option("metric='adam': must be (?=.*none)(?=.*factored)(?=.*diagonal)(?=.*tensor)", metric="adam"),
    option("metric='factord': must be .*factored", metric="factord"),
    option("metric=1: expected text", metric=1),
    option("metric=True: expected text", metric=True),
    option(r"metric_beta=1.*: must be a number in \[0, 1\)", metric_beta=1),
    option(r"metric_beta=-0\.1: must be a number in \[0, 1\)", metric_beta=-0.1),
    option(r"metric_beta=nan: must be a number in \[0, 1\)", metric_beta="nan"),
    option("metric_beta='high': expected a number", metric_beta="high"),
    option("metric_eps=-1.*: must be .*0", metric_eps=-1),
    option("metric_eps=inf: must be .*0", metric_eps=float("inf")),
    option("metric_eps=nan: must be .*0", metric_eps=float("nan")),
    option("metric_eps='small': expected a number", metric_eps="small"),
    option("window_nesterov='maybe': expected true or false", window_nesterov="maybe"),
    option("window_nesterov=2: expected true or false", window_nesterov=2),
    option("centered='yes': expected true or false", centered="yes"),
    option("rms_mode='adamw': must be constant or adam", rms_mode="adamw"),
    option("rms_mode=1: expected text", rms_mode=1),
    option("rms_mode='adam' with update_rms=None: .*give update_rms too", rms_mode="adam"),
    option("rms_mode='adam' with update_rms=None: .*give update_rms too", GGT[0], rms_mode="adam", update_rms=None),
    option("rms_mode='adam' with update_rms=None", preset="measured", rms_mode="adam", update_rms="none"),
    option("unknown option 'metrics'.*did you mean 'metric'", metrics="factored"),
    option("unknown option 'nesterov'.*valid: .*window_nesterov", nesterov=True),
    option("unknown option 'centred'.*did you mean 'centered'", centred=True),
    *(option(r"centered=True.*beta2=0\.9|beta2=0\.9.*centered=True", name, centered=True, beta2=0.9) for name in GGT),
]


@table(BAD)
def test_refused_before_training(bad):
    with pytest.raises(bad.error, match=bad.message) as caught:
        bad.give()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", [*MFAC, *GGT])
def test_every_window_method_has_them(name):
    for key, value in {"metric": "x", "metric_beta": 2, "metric_eps": -1, "centered": "x", "rms_mode": "x"}.items():
        with pytest.raises(OptionError, match=f"{key}="):
            hf_efcp.create_optimizer(name, [one(3, 4)], lr=0.1, **{key: value})
    defaults = hf_efcp.create_optimizer(name, [one(3, 4)], lr=0.1).options
    expected = {
        **{"metric": "none", "metric_beta": 0.99, "metric_eps": 1e-3},
        **{"window_nesterov": False, "centered": False, "rms_mode": "constant"},
    }
    assert {key: getattr(defaults, key) for key in expected} == expected


@pytest.mark.parametrize("name", GGT)
def test_centring_without_decay_is_taken(name):
    assert hf_efcp.create_optimizer(name, [one(3, 4)], lr=0.1, centered=True, beta2=1.0).options.centered is True


@pytest.mark.parametrize("name", MFAC)
def test_adams_size_of_a_preset_does_not_stand_in_the_way_of_the_raw_update(name, monkeypatch):
    cls = get_optimizer_info(name).cls
    monkeypatch.setattr(cls, "measured", {**cls.measured, "rms_mode": "adam", "update_rms": 1.0})
    options = hf_efcp.create_optimizer(name, [one(3, 4)], lr=0.1, preset="measured", update_rms=None).options
    assert (options.update_rms, options.rms_mode) == (None, "adam")
    assert hf_efcp.create_optimizer(name, [one(3, 4)], lr=0.1, preset="measured", rms_mode="adam").options.update_rms == 1.0


def test_adams_size_is_no_error_where_a_checkpoint_has_the_raw_update():
    saver = hf_efcp.create_optimizer(MFAC[0], [one(3, 4)], lr=0.1)
    saver.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    saver.step()
    loader = hf_efcp.create_optimizer(MFAC[0], [one(3, 4)], lr=0.1, preset="measured", rms_mode="adam")
    loader.load_state_dict(saver.state_dict())
    assert (loader.options.update_rms, loader.options.rms_mode) == (None, "adam")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("metric=factored,metric_beta=0.95,metric_eps=1e-4", {"metric": "factored", "metric_beta": 0.95, "metric_eps": 1e-4}),
        ("metric=none", {"metric": "none"}),
        ('{"metric": "none", "centered": false}', {"metric": "none", "centered": False}),
        ("window_nesterov=true,centered=1,rms_mode=adam", {"window_nesterov": True, "centered": True, "rms_mode": "adam"}),
        ("metric= tensor ", {"metric": "tensor"}),
    ],
)
def test_good_texts(text, expected):
    """`none` is the name of a metric here, not the absence of a value."""
    assert get_optimizer_info(MFAC[0]).check(parse_optim_args(text)) == expected
