"""A chain of llama.cpp's samplers."""

from __future__ import annotations

from collections.abc import Iterable

import llama_cpp

from rustllama.engine.sampling import Stage


class Sampler:
    """A chain of llama.cpp's samplers with the state of one sequence."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.handle = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for stage in stages:
            init = getattr(llama_cpp, f"llama_sampler_init_{stage.name}")
            llama_cpp.llama_sampler_chain_add(self.handle, init(*stage.arguments))

    def accept(self, tokens: Iterable[int]) -> None:
        """Shows the prompt's tokens to the penalties."""
        for token in tokens:
            llama_cpp.llama_sampler_accept(self.handle, token)

    def close(self) -> None:
        if self.handle:
            llama_cpp.llama_sampler_free(self.handle)
            self.handle = None
