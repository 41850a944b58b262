"""A transformers model without its weights: names and shapes on the meta device."""

from __future__ import annotations

import torch
import transformers

from ..options import OptionError


def meta_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Make the model that a configuration describes, on the meta device.

    Args:
        name: a folder with a config.json, such a file, or a name on the hub.
        dtype: of the parameters.

    Returns:
        A model of the class that the configuration names; AutoModel chooses the class where it names none.

    Raises:
        OptionError: no configuration is found, or transformers cannot build its model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # there are many kinds: missing file, no network, bad JSON, unknown architecture
        raise OptionError(f"model {name!r}: no configuration found: {_first_line(error)}") from None
    cls = next((c for a in config.architectures or () if (c := getattr(transformers, a, None)) is not None), None)
    try:
        with torch.device("meta"):
            model = cls(config) if cls is not None else transformers.AutoModel.from_config(config)
        model.tie_weights()
        return model.to(dtype)
    except Exception as error:
        raise OptionError(f"model {name!r} cannot be built from its configuration: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
