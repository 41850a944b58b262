"""Data flows one way: core knows torch only, optim knows core, Hugging Face is imported at the edge."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_efcp

PACKAGE = Path(hf_efcp.__file__).parent
ALLOWED = {
    "kernels": {"kernels"},
    "core": {"core", "kernels"},
    "distributed": {"core", "distributed", "options"},
    "engine": {"core", "distributed", "engine", "kernels", "options"},
    "optim": {"core", "distributed", "engine", "optim", "options"},
    "local": {"core", "distributed", "engine", "local", "optim", "options"},
    "demo": {"demo", "options"},
    "pruning": {"core", "integrations", "optim", "options", "pruning"},
}

# Files that are imported only where they are used, and what they may need.
COMPILERS = {
    "demo/bbc.py": ("datasets",),
    "demo/language.py": ("tokenizers", "transformers"),
    "demo/questions.py": ("datasets",),
    "demo/running.py": ("transformers", "yaml"),
    "kernels/cpu_tools.py": ("numba", "numpy"),
    "kernels/cpu_compiling.py": ("numba",),
    "kernels/cpu_top_k.py": ("numba", "numpy"),
    "kernels/cpu_sparse.py": ("numpy",),
    "kernels/cpu_keep.py": ("numba", "numpy"),
    "kernels/cpu_low_rank.py": ("numpy",),
    "kernels/cpu_metric.py": ("numpy",),
    "kernels/cpu_min_max.py": ("numba", "numpy"),
    "kernels/cpu_extract.py": ("numpy",),
    "kernels/cpu_moments.py": ("numpy",),
    "kernels/cpu_adamw.py": ("numpy",),
    "kernels/cpu_many.py": ("numba", "numpy"),
    "kernels/cpu_many_low_rank.py": ("numpy",),
    "kernels/cpu_many_sparse.py": ("numpy",),
}
COMPILERS |= {f"kernels/{file.name}": ("triton",) for file in (PACKAGE / "kernels").glob("gpu_*.py")}


def imports(file):
    """Absolute names of the modules that a file imports."""
    parts = ("hf_efcp", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            if node.module:
                yield f"{base}.{node.module}".strip(".")
            else:
                yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", ALLOWED)
def test_all_but_the_edge_imports_torch_and_what_lies_below_only(layer):
    files = list((PACKAGE / layer).glob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            top, *rest = name.split(".")
            if top == "hf_efcp":
                assert rest[0] in ALLOWED[layer], f"{file}: {name}"
            else:
                assert top in ("torch", *COMPILERS.get(f"{layer}/{file.name}", ())) or top in sys.stdlib_module_names, (
                    f"{file}: {name}"
                )


def test_without_transformers_the_classes_are_there():
    script = """
import sys
for name in ("transformers", "accelerate", "datasets", "peft", "evaluate"):
    sys.modules[name] = None
import torch, hf_efcp
from hf_efcp import *
assert not [name for name in dir(hf_efcp) if name.startswith("EFCP")]
p = torch.nn.Parameter(torch.ones(8, 9))
p.grad = torch.ones(8, 9)
for name in hf_efcp.list_optimizers():
    hf_efcp.create_optimizer(name, [p], lr=0.1).step()
try:
    hf_efcp.register()
except ImportError:
    print("no transformers")
try:
    from hf_efcp import EFCPTrainer
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no transformers\nhf_efcp.EFCPTrainer needs transformers: pip install transformers\n"
