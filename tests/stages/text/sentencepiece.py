"""Tokenizers whose tokens are words, letters and bytes, with a mark for spaces, as SentencePiece has them."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ("<unk>", "</s>", "▁", "a", "b", "ab", "▁a", "▁ab", "b▁", "`", "``", "加")
"""Ids 0, 1, ...; the byte B, where there are bytes, has the id `len(WORDS) + B`."""


def with_bytes() -> PreTrainedTokenizerFast:
    """Decode as Llama 2 does: what is no token is spelled by bytes, and the space in front of a text is dropped."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _made((*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))), decoders.Sequence(parts))


def without_bytes() -> PreTrainedTokenizerFast:
    """Decode by `Metaspace` alone."""
    return _made(WORDS, decoders.Metaspace())


def _made(words: tuple[str, ...], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False)
