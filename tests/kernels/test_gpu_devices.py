"""With tensors on several GPUs, what a step has once, its number and its flag, comes to each: what kernels are launched with."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

META = torch.device("meta")


class Recorder:
    """In place of a kernel: the devices of the tensors that it is launched with."""

    def __init__(self):
        self.devices = None

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        self.devices = {x.device.type for x in args if isinstance(x, torch.Tensor)}


def there(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META)


STEP, OK = torch.tensor(3), torch.tensor(True)
IDS, SLOT = there(2, dtype=torch.int64), there(1, dtype=torch.int64)
FACTORED = (there(2, 4), there(2, 3), IDS), there(2, 4), there(2, 3), (there(2, 4), there(2, 3)), 0.9, OK
DIAGONAL = (there(2, 1, 3), there(2), IDS), there(2, 1, 3), there(2), there(2, 1, 3), 0.9, OK
CALLS = [
    ("gpu_basis", "start", (there(2, 5, 2), STEP, IDS, 1e-6)),
    ("gpu_windows", "store", (there(2, 4, 3), there(2, 3), 1, SLOT, OK)),
    ("gpu_state", "remember", (there(2, 3), there(2, 3), there(2, dtype=torch.bool), OK)),
    ("gpu_state", "remember_factored", FACTORED),
    ("gpu_state", "remember_diagonal", DIAGONAL),
]


@pytest.mark.parametrize(("module", "name", "args"), CALLS, ids=[name for _, name, _ in CALLS])
def test_a_kernel_finds_all_of_its_tensors_on_its_own_device(module, name, args, monkeypatch):
    module, kernel = importlib.import_module(f"hf_efcp.kernels.{module}"), Recorder()
    monkeypatch.setattr(module, f"_{name}", kernel)
    getattr(module, name)(*args)
    assert kernel.devices == {"meta"}


def test_a_table_of_addresses_does_not_follow_the_default_device():
    gpu_tools = importlib.import_module("hf_efcp.kernels.gpu_tools")
    with META:
        assert gpu_tools._on_device(torch.device("cpu"), (1, 2)).tolist() == [1, 2]
