"""A tokenizer learned from texts and a small LLaMA, for language models from scratch without a download."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..options import OptionError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HEAD_DIM = 32
VOCABULARY = 2048
LEAST_VOCABULARY = 258  # 256 bytes and the two special tokens


def learn_tokenizer(texts: Iterable[str], vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn byte-level BPE from the texts; every text comes back from its tokens unchanged.

    Raises:
        OptionError: `vocab_size` is below 258, which the bytes and the two special tokens need.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < LEAST_VOCABULARY:
        raise OptionError(f"vocab_size={vocab_size}: must be an integer >= {LEAST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def small_llama(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, num_hidden_layers: int = 4, positions: int = 512
) -> LlamaForCausalLM:
    """Make a LLaMA with new weights; two query heads share a key. The default has one million parameters.

    Raises:
        OptionError: `hidden_size` is no multiple of 64.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden_size < 1 or hidden_size % (2 * HEAD_DIM):
        raise OptionError(f"hidden_size={hidden_size}: must be a multiple of {2 * HEAD_DIM}")
    heads = hidden_size // HEAD_DIM
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=round(hidden_size * 8 / 3 / HEAD_DIM) * HEAD_DIM,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
