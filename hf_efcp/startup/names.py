"""Makes the names valid in a program that knows nothing of hf_efcp: imports it when transformers' Trainer or Accelerate is.

A Python runs this file when it starts, from the line of a .pth file (`hf-efcp enable`) or from sitecustomize.py beside it
(`hf-efcp run`). It is not imported as a module then: that would import hf_efcp, and so torch, in every Python. For the same
reason it imports nothing else that an interpreter does not have by itself.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

# Where hf_efcp.integrations.patches has something to do; each of them needs torch by itself.
TRIGGERS = (
    "transformers.training_args",
    "transformers.trainer",
    "transformers.trainer_optimizer",
    "transformers.modelcard",
    "accelerate.optimizer",
    "accelerate.accelerator",
)


class NamesOnImport:
    """Finds no module by itself: before the first of `TRIGGERS` is imported, it imports hf_efcp, which registers the names.

    Args:
        package: the folder of hf_efcp, for a Python that does not find it by itself.
    """

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname, path=None, target=None):
        """See importlib: None unless the module is the first of `TRIGGERS`."""
        if fullname not in TRIGGERS or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        self.register()
        # hf_efcp has put a finder of its own before the others, which the search that called this one would miss.
        for finder in list(sys.meta_path):
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                return spec
        return None

    def register(self) -> None:
        """Import hf_efcp; where that fails, the program goes on without the names, and a warning says why."""
        import warnings
        from importlib import util

        try:
            spec = util.find_spec("hf_efcp")
            # A folder that happens to have its name, such as one with a clone in it, is not the package.
            if spec is not None and spec.origin is not None:
                import hf_efcp  # noqa: F401
            elif first := util.spec_from_file_location("hf_efcp", os.path.join(self.package, "__init__.py")):
                module: ModuleType = util.module_from_spec(first)
                sys.modules["hf_efcp"] = module
                first.loader.exec_module(module)  # type: ignore[union-attr]
        except Exception as error:
            sys.modules.pop("hf_efcp", None)
            warnings.warn(f"the optimizers of hf_efcp are not there: {type(error).__name__}: {error}", stacklevel=2)


def install(package: str) -> None:
    """Wait for the first of `TRIGGERS`, unless HF_EFCP=0, or somebody waits already."""
    waiting = any(type(finder).__name__ == "NamesOnImport" for finder in sys.meta_path)
    if os.environ.get("HF_EFCP") != "0" and "hf_efcp" not in sys.modules and not waiting:
        sys.meta_path.insert(0, NamesOnImport(package))


if __name__ == "hf_efcp_names":  # not where it is imported
    install(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
