"""Runs in every Python that a program under `hf-efcp run` starts: this folder is the first on their PYTHONPATH.

It has names.py wait for transformers, has errors end as endings.py says, and runs the sitecustomize that it hides. Older Pythons
than hf_efcp's must be able to read it.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _execute(name):
    variables = {"__name__": "hf_efcp_" + name, "__file__": os.path.join(_HERE, name + ".py")}
    with open(variables["__file__"]) as source:
        exec(compile(source.read(), variables["__file__"], "exec"), variables)
    return variables


def _run_hidden():
    mine = sys.modules.pop("sitecustomize")
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _HERE]
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", mine)


if __name__ == "sitecustomize":  # not where it is imported as a part of hf_efcp
    if os.environ.get("HF_EFCP") != "0" and sys.version_info >= (3, 10):
        _execute("names")
        sys.excepthook = _execute("endings")["hook"](sys.excepthook)
    _run_hidden()
