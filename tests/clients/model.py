"""Makes a LLaMA of a few thousand parameters, its tokenizer of bytes, and data, in the current folder: model/, data/."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write(folder):
    """Write model and data below `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=128, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "model")

    data = folder / "data"
    data.mkdir()
    texts = [(f"What is {i} and {i}?", f"{2 * i}") for i in range(64)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in texts]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}
    form["tags"] = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    (data / "dataset_info.json").write_text(json.dumps({"toy": form}))  # LLaMA-Factory's list


if __name__ == "__main__":
    write(Path.cwd())
