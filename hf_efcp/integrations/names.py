"""The former place of `hf_efcp.optimizer_cls_and_kwargs`, and of `_restore` in files pickled by version 0.1, which load."""

from .patches import _restore as _restore
from .trainer_options import optimizer_cls_and_kwargs as optimizer_cls_and_kwargs
