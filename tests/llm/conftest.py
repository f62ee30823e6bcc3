from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.data.tokenizer import train_bpe
from luthier.llm import LocalModel


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["the quick brown fox jumps over the lazy dog. hello world! "] * 3, 280)


@pytest.fixture(scope="session")
def network(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random two-layer model in float32 whose embedding has ten rows that the tokenizer does not know."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 10,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,  # far from uniform, so that greedy choices are no near-ties
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def local(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Callable[..., LocalModel]:
    """Makes a LocalModel; its worker thread ends with the process."""
    return lambda **options: LocalModel(network, tokenizer, name="tiny", **options)
