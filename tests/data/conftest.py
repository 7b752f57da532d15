"""A small byte-level BPE tokenizer, and the chat templates of common kinds."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [f"Convert to kilograms {i} pounds, answer in a house style on day {7 * i}" for i in range(200)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """No chat template; `<eos>` ends, `<pad>` pads, `<bos>` exists but is not put before texts."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<eos>", "<pad>", "<bos>", "<|user|>", "<|bot|>", "<|turn|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", extra_special_tokens=special[3:]
    )
