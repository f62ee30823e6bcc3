from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from luthier.data.token_bytes import _letters, token_bytes
from luthier.data.tokenizer import LOSSLESS_PROBES, byte_tokenizer, encode_texts, train_bpe


def test_letters_are_those_of_byte_level_tokenizers() -> None:
    assert _letters() == {letter: byte for byte, letter in bytes_to_unicode().items()}


def test_joined_they_are_the_text() -> None:
    trained = train_bpe(["the luthier planes the top " * 20, *LOSSLESS_PROBES], 290)
    for tokenizer in (byte_tokenizer(), trained):
        for text, ids in zip(LOSSLESS_PROBES, encode_texts(tokenizer, LOSSLESS_PROBES), strict=True):
            found = token_bytes(tokenizer, ids)
            assert len(found) == len(ids)
            assert all(found)
            assert b"".join(found) == text.encode()
        assert token_bytes(tokenizer, [tokenizer.eos_token_id]) == [b""]


def test_spaces_and_bytes_as_llama_writes_them() -> None:
    vocab = {"</s>": 0, "<0x0A>": 1, "<0xE2>": 2, "▁the": 3, "é": 4, "▁": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert token_bytes(tokenizer, [3, 4, 1, 2, 5, 0]) == [b" the", "é".encode(), b"\n", b"\xe2", b" ", b""]
