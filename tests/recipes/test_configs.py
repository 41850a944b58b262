"""Settings for known models: a recipe knows every name in them, and `hf-efcp estimate` says what their comments say."""

import importlib
import json
import re

import pytest
import yaml
from transformers.training_args import OptimizerNames

from hf_efcp.cli.main import main
from hf_efcp.registry import get_optimizer_info, list_optimizers
from tests.recipes.helpers import RECIPES

CONFIGS = [path for path in sorted((RECIPES / "configs").glob("*.yaml")) if "# estimate: " in path.read_text()]
KINDS = ("Arguments", "ModelArguments", "DataArguments", "TrainingArguments")


def test_the_known_models_have_settings():
    assert len(CONFIGS) == 13


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_comment_is_what_estimate_says(path, tmp_path, capsys):
    text = path.read_text()
    command = re.search(r"^# estimate: hf-efcp (.+)$", text, re.MULTILINE)[1]
    assert main([*command.split(), "--json", str(tmp_path / "e.json")]) == 0
    optimizers = json.loads((tmp_path / "e.json").read_text())["optimizers"]
    (ours,) = (entry for name, entry in optimizers.items() if name in list_optimizers())
    adamw = optimizers[OptimizerNames.ADAMW_TORCH.value]
    gib = [f"{count / 2**30:.2f} GiB" for count in (ours["total"], adamw["total"], ours["needs"])]
    answer = (
        f"# answer: state {ours['total']:,} bytes ({gib[0]}; AdamW {gib[1]}), with parameters and gradients {gib[2]}, fits: yes"
    )
    assert answer in text.splitlines() and ours["fits"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_knows_the_settings(path):
    text, values = path.read_text(), yaml.safe_load(path.read_text())
    name = re.search(r"recipes/(\w+)\.py", text)[1]
    if not (RECIPES / f"{name}.py").exists():
        pytest.skip(f"no recipe {name}")
    recipe = importlib.import_module(name)
    fields = {field for kind in KINDS if hasattr(recipe, kind) for field in getattr(recipe, kind).__dataclass_fields__}
    assert set(values) <= fields
    assert f"recipes/configs/{path.name}" in text and path.stem in values["output_dir"]
    # The estimate is of this run: its dtype, its adapters, its options.
    command = re.search(r"^# estimate: (.+)$", text, re.MULTILINE)[1]
    assert ("--dtype bfloat16" in command) == (values.get("torch_dtype") == "bfloat16")
    assert (f"--lora_r {values.get('lora_r')}" in command) == values.get("lora", False)
    optim = re.search(r"--optim (\w+)", command)[1]
    assert values.get("optim", recipe.TrainingArguments.optim) == optim
    given = {field.removeprefix("efcp_"): value for field, value in values.items() if field.startswith("efcp_")}
    get_optimizer_info(optim).check(given)
