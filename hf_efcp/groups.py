"""A model's parameters as optimizer groups, one for each (kind, weight decay, compressed or not, device mesh) that occurs.

Kinds come from modules, not from names: `embedding` (nn.Embedding), `head` (the model's output embeddings), `matrix` (any
other tensor of two or more dimensions: Linear, Conv1D, convolutions, LoRA's A and B), `vector` (biases, norms). Tied weights
belong to the module that comes first. Plain torch: Hugging Face models are recognised by what they offer.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .engine.parameters import ORDER, canonical_name
from .options import GroupOptions, OptionError, build

logger = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    *,
    decay_names: Iterable[str] | None = None,
    target_modules: str | Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups, without empty ones.

    Args:
        model: any module; frozen parameters are left out, shared ones occur once.
        weight_decay: of the parameters that decay; the others get 0.
        decay_names: which parameters decay, as in `model.named_parameters()`; None: all but kind `vector`.
        target_modules: whose matrices are compressed: "all-linear" (but not the head), a name or part of one, a regular
            expression for the whole name, or several of these. The rest enters the window whole, as GaLore's other
            parameters are optimized whole: window_size numbers for each entry; a method without a window trains it by AdamW.
            None: all matrices are compressed. A tensor that several modules share (lm_head and the embedding) is selected by the
            name of any of them. A target that matches frozen modules only is skipped, and the log says so.

    Returns:
        Groups for any of our optimizers: `params` as (canonical name, tensor) pairs, `weight_decay`, `kind`, `compress`. As in
        transformers, group 0 decays and group 1 does not, where the model has both; `efcp_order` is their order in the model.

    Raises:
        OptionError: no module, a bad weight_decay, or a target that matches no module with a matrix.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"parameter_groups takes a module, got {type(model).__name__}: pass the model, not its parameters")
    weight_decay = build(GroupOptions, {"weight_decay": weight_decay}, "parameter_groups").weight_decay
    decaying = None if decay_names is None else set(decay_names)
    targets, frozen = (None, []) if target_modules is None else _targets(model, parse_targets(target_modules))
    groups: dict[tuple, dict[str, Any]] = {}
    decaying_groups = set()
    for name, kind, p in _parameters(model):
        decays = kind != "vector" if decaying is None else name in decaying
        decay = weight_decay if decays else 0.0
        compress = targets is None or kind == "vector" or id(p) in targets
        key = (kind, decay, compress, id(getattr(p, "device_mesh", None)))
        new = {"params": [], "weight_decay": decay, "kind": kind, "compress": compress, ORDER: len(groups)}
        group = groups.setdefault(key, new)
        group["params"].append((canonical_name(name), p))
        if decays:
            decaying_groups.add(key)
    for target in frozen:
        logger.warning("optim_target_modules: %r matches frozen modules only, and is skipped: they are not trained", target)
    _tell_of_whole_rows(groups.values())
    return _as_transformers([(group, key in decaying_groups) for key, group in groups.items()])


def parse_targets(given: Any) -> list[str]:
    """`optim_target_modules` as a list: from a list, JSON, or text with commas.

    Raises:
        OptionError: neither text nor a list of text, or nothing in it.
    """
    targets = given
    if isinstance(given, str):
        try:
            is_pattern = any(sign in given for sign in "()[]{}*+?|\\^$")
            targets = json.loads(given) if given.lstrip().startswith("[") else [given] if is_pattern else given.split(",")
        except json.JSONDecodeError:  # a regular expression that starts with a character class
            targets = [given]
    if not isinstance(targets, list | tuple | set) or not all(isinstance(t, str) for t in targets):
        raise OptionError(f"optim_target_modules={given!r}: expected names of modules, all-linear, or a list of them")
    targets = [t.strip() for t in targets if t.strip()]
    if not targets:
        raise OptionError(f"optim_target_modules={given!r}: names no module")
    return targets


def check_targets(model: nn.Module, target_modules: Any) -> None:
    """Raise OptionError where a target is of the wrong type or matches no module with a matrix."""
    if target_modules is not None:
        _targets(model, parse_targets(target_modules))


def _parameters(model: nn.Module, trainable: bool = True) -> Iterator[tuple[str, str, Tensor]]:
    """(name, kind, parameter) of every parameter, each once; of those that are trainable, or of those that are frozen."""
    head = _head(model)
    seen = set()
    for module_name, module in model.named_modules():
        for own_name, p in module.named_parameters(recurse=False):
            if p.requires_grad != trainable or id(p) in seen:
                continue
            seen.add(id(p))
            if p.ndim < 2:
                kind = "vector"
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
                kind = "embedding"
            else:
                kind = "head" if module is head else "matrix"
            yield f"{module_name}.{own_name}" if module_name else own_name, kind, p


def _as_transformers(groups: list[tuple[dict[str, Any], bool]]) -> list[dict[str, Any]]:
    """Give groups, with whether they decay, in the order on which users of Trainer rely: the first decays, the second does not.

    These two are of matrices and of vectors, if there are such; the others stay in the order of the model.
    """
    firsts = []
    for wanted, kind in ((True, "matrix"), (False, "vector")):
        having = [group for group, decays in groups if decays == wanted]
        firsts += sorted(having, key=lambda g: (g["kind"] != kind, not g["compress"]))[:1]
    return firsts + [group for group, _ in groups if all(group is not first for first in firsts)]


def _tell_of_whole_rows(groups: Iterable[dict[str, Any]]) -> None:
    sizes = {True: 0, False: 0}
    for group in groups:
        sizes[group["compress"]] += sum(p.numel() for _, p in group["params"])
    if sizes[False]:
        logger.warning(
            "optim_target_modules: %s of %s parameters are compressed; the other %s enter the window whole, "
            "window_size numbers for each (a method without a window trains them by AdamW)",
            *(f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n:,}" for n in (sizes[True], sum(sizes.values()), sizes[False])),
        )


def _head(model: Any) -> nn.Module | None:
    """The output embeddings of a Hugging Face model; None: it has none, or it is another module."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _targets(model: nn.Module, targets: list[str]) -> tuple[set[int], list[str]]:
    """Ids of the trainable matrices that `targets` select by any module that has them, and the targets of frozen ones only."""
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(canonical_name(module_name))
    trained, frozen = ({id(p): kind for _, kind, p in _parameters(model, t) if kind != "vector"} for t in (True, False))

    def matching(target: str, matrices: dict[int, str]) -> set[int]:
        return {i for i, kind in matrices.items() if any(_matches(target, owner, kind) for owner in owners[i])}

    selected: set[int] = set()
    skipped = []
    for target in targets:
        found = matching(target, trained)
        selected |= found
        if found:
            continue
        if not matching(target, frozen):
            leaves = dict.fromkeys(o.rpartition(".")[2] or "(the model itself)" for i in trained for o in owners[i])
            near = difflib.get_close_matches(target, leaves, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(
                f"optim_target_modules: {target!r} matches no module with trainable matrices; {hint}"
                f"such modules: {', '.join(leaves) or 'none'}"
            )
        skipped.append(target)
    return selected, skipped


def _matches(target: str, name: str, kind: str) -> bool:
    if target == "all-linear":
        return kind == "matrix"
    try:
        return target in name or re.fullmatch(target, name) is not None
    except re.error:
        return False
