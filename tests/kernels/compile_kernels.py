"""Compile the Triton kernels for GPUs that are not there: python tests/kernels/compile_kernels.py 75 80 90 (compute capability).
With --few: in some of the formats, but every kernel, in a third of the time.

The kernels are those that steps of the optimizers launch, with the arguments that they give them: steps are taken on fake tensors
(`hf_efcp.bench.launches`), and each launch compiles its kernel to machine code instead. One line for each of them says what it
needs. The status is 1 where one does not compile, needs more than a GPU has, or was not launched by any of the steps.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from hf_efcp import kernels
from hf_efcp.bench.launches import count
from hf_efcp.cli.common import chosen, dtype_of
from hf_efcp.cli.shapes import module
from hf_efcp.kernels import calls
from hf_efcp.registry import all_optimizers

# Bytes of registers that a thread may have to keep in memory.
SPILLS = 64
# Bytes of shared memory that a block may have, by compute capability.
SHARED = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
FOLDER = Path(triton.__file__).parent
CUOBJDUMP = FOLDER / "backends/nvidia/bin/cuobjdump"

# Two of a shape, an odd number of rows, thin, a vector, and rows that are too long for one program.
SHAPES = {"a": (768, 768), "b": (768, 768), "c": (1001, 768), "d": (768, 8), "e": (768,), "f": (32, 40_000)}
# dtype of the parameters, weight decay, options: those of `hf-efcp bench`, which go to the optimizers that have them.
CASES = (
    ("float32", 0.0, ""),
    ("float32", 0.01, "preset=paper,error_dtype=bf16,window_size=5"),
    ("float32", 0.0, "error_format=int4,metric=none,momentum=0.9,residual=feedback"),
    ("bfloat16", 0.01, "stochastic_rounding=true,error_format=int8,window_format=low_bit"),
    ("float64", 0.0, "preset=paper,window_size=4"),
    ("float32", 0.0, "preset=paper,window_format=low_bit,error_format=int8"),
    ("float64", 0.0, "preset=paper,window_format=low_bit,window_size=4"),
)
FEW = (CASES[0], CASES[3], CASES[6])


class Driver:
    """In place of a GPU's: says what to compile for. A target is a device of its own, for each has its own kernels."""

    target = 0

    def get_current_device(self):
        return self.target

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.target, 32)


class Compiler:
    """Compiles what is launched, and remembers what came of it.

    Args:
        targets: compute capabilities.
    """

    def __init__(self, targets):
        self.targets, self.driver, self.compile = targets, Driver(), JITFunction.run
        self.seen, self.launched, self.faults = set(), set(), []
        triton.runtime.driver.set_active(self.driver)

    def __call__(self, function, *args, grid, **kwargs):
        """Compile a function for the arguments of a launch."""
        self.launched.add(function.fn.__name__)
        for target in self.targets:
            self.driver.target = target
            try:
                kernel = self.compile(function, *args, grid=grid, warmup=True, **kwargs)
            except Exception as error:  # the compiler's are of many types
                key, line = (target, function.fn.__name__, str(error)[:300]), f"{type(error).__name__}: {str(error)[-800:]}"
                needs = None
            else:
                key, needs = (target, kernel.hash), resources(kernel)
                line = ", ".join(f"{name} {value}" for name, value in needs.items())
            if key in self.seen:
                continue
            self.seen.add(key)
            line = f"sm_{target} {function.fn.__name__}({signature(function, args, kwargs)}): {line}"
            print(line, flush=True)
            if needs is None or needs["spills"] > SPILLS or needs["shared"] > SHARED.get(target, 48 * 1024):
                self.faults.append(line)


def signature(function, args, kwargs):
    """Types of the tensors, and values of the constants, in words."""
    given = dict(zip(function.arg_names, args, strict=False)) | kwargs
    constants = {p.name for p in function.params if p.is_constexpr}
    words = [str(v.dtype).removeprefix("torch.") for v in given.values() if isinstance(v, torch.Tensor)]
    return ", ".join(words + [f"{k}={v}" for k, v in given.items() if k in constants or k not in function.arg_names])


def resources(kernel):
    """Registers of a thread, bytes of them in memory ("spills"), bytes of shared memory and warps of a block."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL"))
    needs = {"registers": registers, "spills": stack + local}
    return {**needs, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}


def sources():
    """The files of Triton kernels; what they share is in gpu_tools.py, which launches none."""
    return sorted(set(Path(kernels.__file__).parent.glob("gpu_*.py")) - {Path(kernels.__file__).parent / "gpu_tools.py"})


def kernels_in(files):
    """Names of the functions for Triton that no other one of them calls: those are launched."""
    nodes = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    ours = {node.name: node for node in nodes if any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)}
    calls = [call.func for node in ours.values() for call in ast.walk(node) if isinstance(call, ast.Call)]
    return set(ours) - {call.id for call in calls if isinstance(call, ast.Name)}


def is_there(operation):
    """Whether the module of an operation's Triton kernel exists."""
    name = f"{kernels.__name__}.{calls.MODULES[operation]['cuda']}"
    return importlib.util.find_spec(name) is not None


def main(targets, cases):
    """Compile all kernels; give what is wrong, as lines."""
    compiler, missing = Compiler(targets), set()
    for dtype, weight_decay, text in cases:
        for info in all_optimizers():
            if info.family != "mfac":  # the same kernels
                continue
            own = ",".join(option for option in text.split(",") if option.partition("=")[0] in info.options())
            ((name, options),) = chosen(info.name, own).items()
            model = module(SHAPES, dtype_of(dtype))
            found = count(model, name, {**options, "weight_decay": weight_decay}, steps=1, launched=compiler)
            missing |= set(found.missing)
    faults = compiler.faults
    faults += [f"the kernel of `{name}` raises, see the log" for name in sorted(missing) if is_there(name)]
    never = kernels_in(sources()) - compiler.launched
    return faults + [f"{name} was never launched" for name in sorted(never)]


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word != "--few"]
    wrong = main(numbers or [90], FEW if "--few" in sys.argv else CASES)
    print("", *wrong, sep="\n")
    sys.exit(bool(wrong))
