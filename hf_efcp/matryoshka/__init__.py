"""MatryoshkaLoRA (arXiv 2605.07850) for PEFT: one LoRA adapter that is trained once and can be cut at every rank.

Importing this package tells PEFT how to build and to read adapters of a `MatryoshkaConfig`.
"""

import importlib.util

if importlib.util.find_spec("peft") is None:
    raise ImportError("hf_efcp.matryoshka needs peft: pip install peft")

from ..core.nested import aurac
from .adapters import at_rank, save_truncated, set_rank, truncate
from .config import MatryoshkaConfig, tell_peft

tell_peft()

__all__ = ["MatryoshkaConfig", "at_rank", "aurac", "save_truncated", "set_rank", "truncate"]
