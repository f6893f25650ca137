"""A chain of llama.cpp's samplers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import llama_cpp

from rustllama.engine.sampling import Stage


class Sampler:
    """A chain of llama.cpp's samplers with the state of one sequence.

    `is_greedy` where it does no more than to take the likeliest token: for that, llama.cpp's list of all candidates is
    not made, which takes ten times as long.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.is_greedy = [stage.name for stage in stages] == ["greedy"]
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
