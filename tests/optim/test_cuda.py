"""On a GPU: the same update as on the CPU, with TF32 on. By hand: python -m pytest -m gpu tests (about a minute)."""

import pytest
import torch

from hf_efcp.kernels import calls
from tests.reference import NAMES, info, make, names, parameters, relative, set_gradients, update_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
EVERY = pytest.mark.parametrize("name", NAMES)


def pair(name, device="cuda", **options):
    """The same optimizer on the same parameters, on the CPU and on the device."""
    here = parameters(dtype=torch.float32)
    there = [torch.nn.Parameter(p.detach().to(device)) for p in here]
    return (make(name, here, **options), here), (make(name, there, **options), there)


LOW_BIT = {"window_format": "low_bit", "error_format": "int8"}
BF16 = {"error_dtype": "bf16", "window_dtype": "bf16"}


METRIC = {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8, "window_nesterov": True}
PRESET = {**METRIC, **BF16, "residual": "momentum", "weight_decay": 0.1}
OPTIONS = [{}, {"scope": "layer"}, {"weight_decay": 0.1}, BF16, LOW_BIT, {"momentum": 0.5}, METRIC, PRESET]


@pytest.fixture(autouse=True)
def no_kernel_fails(monkeypatch):
    monkeypatch.setattr(calls, "FAILED", set())
    yield
    assert not calls.FAILED


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@EVERY
def test_cuda_gives_the_update_of_the_cpu(name, options):
    (cpu, here), (gpu, there) = pair(name, window_size=5, update_rms=0.5, **options)
    generator = torch.Generator().manual_seed(1)
    torch.set_float32_matmul_precision("high")
    try:
        for _ in range(12):
            grads = set_gradients(here, generator)
            for p, g in zip(there, grads, strict=True):
                p.grad = g.to(p.device)
            u, v = update_of(cpu, here), update_of(gpu, there).cpu()
            # A state in few bits may round a tie the other way, and top-k may break one. Newton-Schulz is in bf16 on a GPU.
            bound = 1e-1 if options is LOW_BIT else 2e-2 if options in (BF16, PRESET) else 1e-3
            assert relative(v, u) < max(bound, 5e-2 if "ns_schedule" in info(name).options() else 0.0)
        assert all(t.device.type == there[0].device.type for entry in gpu.state.values() for t in entry.values())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@EVERY
def test_state_moves_between_devices(name):
    (cpu, here), (gpu, there) = pair(name, window_size=3)
    generator = torch.Generator().manual_seed(1)
    set_gradients(here, generator)
    cpu.step()
    gpu.load_state_dict(cpu.state_dict())
    for p, q in zip(here, there, strict=True):
        for key, value in cpu.state[p].items():
            assert torch.equal(value, gpu.state[q][key].cpu())


@EVERY
def test_a_gradient_that_is_not_finite_is_skipped(name):
    _, (gpu, there) = pair(name, window_size=3)
    generator = torch.Generator(there[0].device).manual_seed(1)
    for p in there:
        p.grad = torch.randn(p.shape, generator=generator, device=p.device)
    gpu.step()
    before = [p.detach().clone() for p in there]
    there[1].grad[0, 0] = torch.nan
    gpu.step()
    assert all(torch.equal(p, b) for p, b in zip(there, before, strict=True))
    there[1].grad[0, 0] = 1.0
    with pytest.warns(RuntimeWarning, match="1 skipped so far"):  # the host hears of it one step later
        gpu.step()
    assert not any(torch.equal(p, b) for p, b in zip(there, before, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", names(family="mfac"))
def test_a_step_of_mfac_waits_for_nothing(name, options):
    _, (gpu, there) = pair(name, window_size=4, update_rms=0.5, **options)
    generator = torch.Generator(there[0].device).manual_seed(1)

    def step():
        for p in there:
            p.grad = torch.randn(p.shape, generator=generator, device=p.device)
        gpu.step()

    step()
    step()
    before = [p.detach().clone() for p in there]
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(torch.equal(p, b) for p, b in zip(there, before, strict=True))


FORMATS = [{}, BF16, LOW_BIT, {"error_format": "int4"}, {**METRIC, "residual": "momentum"}, {**METRIC, **BF16, "momentum": 0.5}]
# Clock cycles for which the device sleeps: a quarter of a second. A queue takes 1,000 launches, more than these steps have.
ASLEEP = 5 * 10**8


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@EVERY
def test_a_step_returns_while_the_device_is_busy(name, format, weight_decay, scope):
    """Waits inside of libraries are seen too; the second step waits for the first one's flag.

    GGT waits for its eigendecompositions. DASH waits for its own where a count may be a multiple of the interval, here never.
    """
    there = [torch.nn.Parameter(torch.zeros(shape, device="cuda")) for shape in ((24, 16), (24, 16), (16,))]
    rare = {"inverse_root_interval": 50}
    gpu = make(name, there, window_size=4, update_rms=0.5, weight_decay=weight_decay, scope=scope, **rare, **format)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(6):  # kernels are compiled, the window is full
        for p in there:
            p.grad = torch.randn(p.shape, generator=generator, device=p.device)
        gpu.step()
    torch.cuda.synchronize()
    awake = torch.cuda.Event()
    torch.cuda._sleep(ASLEEP)
    awake.record()
    gpu.step()
    assert awake.query() == (name in names(family="ggt"))
    gpu.step()
    assert awake.query()
