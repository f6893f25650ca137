"""The weights of a GGUF and its vocabulary."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp

from rustllama.engine.native.library import forget_words, words
from rustllama.errors import BadModelFile

# llama.cpp's pattern for the pre-tokenizer `superbpe` looks from each digit to the end of its number, to cut threes
# from the right: 26,000 digits take 23 s.
_LONG_NUMBER = re.compile("[0-9]{1000,}")
_CUT_DIGITS = 999


class Model:
    """The weights of a GGUF and its vocabulary. Tokenizing may run beside a context's calls: it only reads."""

    def __init__(
        self, path: str, *, num_gpu: int = 0, use_mmap: bool = True, tell: Callable[[float], None] | None = None
    ) -> None:
        """Raises BadModelFile with llama.cpp's own words. `num_gpu` -1 is every layer.

        `tell` gets the share of the weights that is loaded, from 0 to 1, in this thread; it must not raise.
        """
        params = llama_cpp.llama_model_default_params()
        if tell is not None:
            params.progress_callback = _progress_callback(tell)
        params.n_gpu_layers = num_gpu
        self.on_gpu = num_gpu != 0  # some of its layers
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if use_mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        forget_words()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise BadModelFile(f"llama.cpp could not load '{path}': {words()}.")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._is_bpe = llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_BPE
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._pieces: dict[int, bytes | None] = {}

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """`parse_special` lets text that spells a special token become it; no BOS is added, see `leading_bos`."""
        parts = with_short_numbers(text) if self._is_bpe else [text]
        return [token for part in parts for token in self._tokenize(part, parse_special)]

    def _tokenize(self, text: str, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        while True:
            tokens = (llama_cpp.llama_token * size)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, size, False, parse_special)
            if count >= 0:
                return list(tokens[:count])
            size = -count

    def piece(self, token: int) -> bytes:
        """The bytes of a token as they appear in an answer: none for a control token."""
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def answer_piece(self, token: int) -> bytes | None:
        """`piece`, remembered; None for a token that ends the generation."""
        try:
            return self._pieces[token]
        except KeyError:
            self._pieces[token] = found = None if self.is_eog(token) else self.piece(token)
            return found

    def is_eog(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    @property
    def leading_bos(self) -> int | None:
        """The BOS token, where the vocabulary wants every prompt to begin with it."""
        return llama_cpp.llama_vocab_bos(self._vocab) if llama_cpp.llama_vocab_get_add_bos(self._vocab) else None

    @property
    def bos_token(self) -> str:
        return self._text(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos_token(self) -> str:
        return self._text(llama_cpp.llama_vocab_eos(self._vocab))

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        return str(llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"))

    def close(self) -> None:
        """All contexts are closed before."""
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None


def with_short_numbers(text: str) -> Iterator[str]:
    """The text in parts; only numbers of a thousand digits are cut, at threes from the right."""
    start = 0
    for number in _LONG_NUMBER.finditer(text):
        first = number.start() + (len(number[0]) % _CUT_DIGITS or _CUT_DIGITS)
        for place in range(first, number.end(), _CUT_DIGITS):
            yield text[start:place]
            start = place
    yield text[start:]


def _progress_callback(tell: Callable[[float], None]) -> Any:
    def callback(share: float, _: object) -> bool:
        tell(share)
        return True  # False would end the load

    return llama_cpp.llama_progress_callback(callback)
