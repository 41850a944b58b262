"""MODEL of `estimate` and `bench`: a module on the meta device, which has names, shapes and dtypes but no memory.

A built-in name (shapes computed here from the configuration's numbers), a list of shapes in a file, or whatever transformers
finds a configuration for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..options import OptionError, unknown_name

# Parameter name -> shape.
Shapes = dict[str, tuple[int, ...]]


def bert(vocabulary: int, hidden: int, layers: int, intermediate: int, positions: int = 512, types: int = 2) -> Shapes:
    """Parameters of transformers' BertModel (and RobertaModel), pooler included."""
    shapes: Shapes = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)})

    for kind, number in (("word", vocabulary), ("position", positions), ("token_type", types)):
        shapes[f"embeddings.{kind}_embeddings.weight"] = (number, hidden)
    norm("embeddings.LayerNorm")
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{part}", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", intermediate, hidden)
        linear(f"{layer}.output.dense", hidden, intermediate)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    return shapes


def llama(vocabulary: int, hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, tied: bool = False) -> Shapes:
    """Parameters of transformers' LlamaForCausalLM; `tied`: the head is the embedding."""
    kv = hidden // heads * kv_heads
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("gate", "up"):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
        for name in ("input", "post_attention"):
            shapes[f"{layer}.{name}_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


BUILT_IN = {
    "minilm": lambda: bert(30522, 384, 6, 1536),
    "bert-base": lambda: bert(30522, 768, 12, 3072),
    "bert-large": lambda: bert(30522, 1024, 24, 4096),
    "roberta-base": lambda: bert(50265, 768, 12, 3072, positions=514, types=1),
    "llama-1b": lambda: llama(128256, 2048, 16, 8192, 32, 8, tied=True),  # Llama 3.2
    "llama-3b": lambda: llama(128256, 3072, 28, 8192, 24, 8, tied=True),  # Llama 3.2
    "llama-7b": lambda: llama(32000, 4096, 32, 11008, 32, 32),  # Llama 2
    "llama-8b": lambda: llama(128256, 4096, 32, 14336, 32, 8),  # Llama 3.1
}
BUILT_IN_HELP = ", ".join(BUILT_IN)


def load(name: str, dtype: torch.dtype) -> nn.Module:
    """The model that the user names, on the meta device, with parameters of `dtype`.

    Args:
        name: a built-in name; a .json file of shapes ({"name": [rows, cols], ...} or [[rows, cols], ...]); a folder with a
            config.json, such a file, or a name of the hub.
        dtype: a floating one.

    Raises:
        OptionError: none of these, or a file that cannot be used.
    """
    if name in BUILT_IN:
        return module(BUILT_IN[name](), dtype)
    path = Path(name)
    if path.is_file():
        content = _read_json(path)
        if not (isinstance(content, dict) and {"model_type", "architectures"} & content.keys()):
            return module(_checked(content, path), dtype)
    try:
        from ..integrations.models import meta_model
    except ImportError:
        raise OptionError(
            f"model {name!r}: without transformers installed there are {BUILT_IN_HELP}, or a file of shapes"
        ) from None
    try:
        return meta_model(name, dtype)
    except OptionError as error:
        if path.exists() or "/" in name:
            raise
        raise OptionError(f"{unknown_name('model', name, BUILT_IN)}, a file, a folder or a name of the hub ({error})") from None


def module(shapes: Shapes, dtype: torch.dtype) -> nn.Module:
    """A module on the meta device whose `named_parameters` are these.

    Names are all there is to tell kinds by: a matrix of an `...embed...` module is an embedding, `lm_head` the head.

    Raises:
        OptionError: a name that is a parameter and a module too.
    """
    root = _Root()
    for name, shape in shapes.items():
        *parents, own = name.split(".")
        owner: nn.Module = root
        for i, part in enumerate(parents):
            leaf = i == len(parents) - 1
            if part not in owner._modules:
                if not part or hasattr(owner, part):
                    raise OptionError(f"a list of shapes cannot have a parameter {name!r} beside the others")
                embeds = leaf and "embed" in part.lower() and own == "weight" and len(shape) == 2
                owner.add_module(part, nn.Embedding(shape[0], shape[1], device="meta", dtype=dtype) if embeds else nn.Module())
            owner = owner.get_submodule(part)
        if not own or (hasattr(owner, own) and own not in owner._parameters):
            raise OptionError(f"a list of shapes cannot have a parameter {name!r} beside the others")
        owner.register_parameter(own, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
    return root


# Names of the matrices that PEFT adapts by default in LLaMA and in BERT.
_ADAPTED = ("q_proj", "v_proj", "query", "value")


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Freeze the model and put LoRA adapters of `rank` beside its query and value projections, as PEFT does.

    Args:
        model: on the meta device; it is changed.
        rank: r of A (r, cols) and B (rows, r), which are fp32.

    Raises:
        OptionError: the model has no query or value projection.
    """
    found = [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] in _ADAPTED and hasattr(m, "weight")]
    if not found:
        raise OptionError(f"no matrix to adapt: the model has none of {', '.join(_ADAPTED)}")
    model.requires_grad_(False)
    for _, owner in found:
        rows, cols = owner.weight.shape
        for name, shape in (("lora_A", (rank, cols)), ("lora_B", (rows, rank))):
            adapter = nn.Module()
            adapter.register_parameter("weight", nn.Parameter(torch.empty(shape, device="meta")))
            owner.add_module(name, nn.ModuleDict({"default": adapter}))
    return model


class _Root(nn.Module):
    def get_output_embeddings(self) -> nn.Module | None:
        return self._modules.get("lm_head")


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} is no readable JSON: {error}") from None


def _checked(content: object, path: Path) -> Shapes:
    """The content of a file of shapes, with every number checked."""
    entries = {str(i): s for i, s in enumerate(content)} if isinstance(content, list) else content
    if not isinstance(entries, Mapping) or not entries:
        raise OptionError(f'{path}: expected shapes, {{"name": [rows, cols], ...}} or [[rows, cols], ...]')
    for name, shape in entries.items():
        fine = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
        if not fine:
            raise OptionError(f"{path}: {name!r} has {json.dumps(shape)}: a shape is a list of integers >= 0")
    return {name: tuple(shape) for name, shape in entries.items()}
