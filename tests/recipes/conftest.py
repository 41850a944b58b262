"""A tiny model and the flags of a short run on local files."""

import datasets
import pytest
import torch

from tests.recipes.helpers import WORDS, write_csv


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Relative output folders and the cache of local files stay in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, "the", "a", "##s", *WORDS["animal"], *WORDS["fruit"]])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = str(tmp_path_factory.mktemp("model"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,  # with the usual 0.02 so small a model needs hundreds of steps to leave the plateau
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(tmp_path, tiny_model) -> list[str]:
    train, validation = write_csv(tmp_path / "train.csv", 64), write_csv(tmp_path / "dev.csv", 24)
    values = {
        "model_name_or_path": tiny_model,
        "train_file": train,
        "validation_file": validation,
        "max_seq_length": 16,
        "output_dir": "out",
        "learning_rate": 5e-3,
    }
    return [f"--{name}={value}" for name, value in values.items()]
