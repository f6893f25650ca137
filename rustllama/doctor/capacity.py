"""Which usual models fit into memory, and how fast they could be. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rustllama.core import MemoryPlan, ModelInfo
from rustllama.engine import memory
from rustllama.settings import Settings

QUANTIZATIONS = {"Q4_K_M": 4.9, "Q8_0": 8.5, "F16": 16.0}  # bits of a weight, all tensors together


@dataclass(frozen=True, slots=True)
class Shape:
    """A usual architecture of that size."""

    name: str
    parameters: float
    blocks: int
    width: int
    kv_heads: int
    head: int  # channels
    vocabulary: int

    def info(self, quantization: str) -> ModelInfo:
        return ModelInfo(
            architecture="llama",
            parameter_count=int(self.parameters),
            quantization=quantization,
            size_bytes=int(self.parameters * QUANTIZATIONS[quantization] / 8),
            parts=(),
            block_count=self.blocks,
            context_length=131_072,
            embedding_length=self.width,
            head_count=self.width // self.head,
            head_count_kv=(self.kv_heads,) * self.blocks,
            key_length=self.head,
            value_length=self.head,
            vocabulary_size=self.vocabulary,
        )


SHAPES = (  # Llama 3 and Qwen 3
    Shape("70B", 70.6e9, 80, 8192, 8, 128, 128_256),
    Shape("32B", 32.8e9, 64, 5120, 8, 128, 151_936),
    Shape("14B", 14.8e9, 40, 5120, 8, 128, 151_936),
    Shape("8B", 8.03e9, 32, 4096, 8, 128, 128_256),
    Shape("3B", 3.21e9, 28, 3072, 8, 128, 128_256),
    Shape("1B", 1.24e9, 16, 2048, 8, 64, 128_256),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """The largest usual model of a quantization that fits."""

    model: str
    quantization: str
    size_bytes: int
    plan: MemoryPlan
    tokens_per_s: float  # of one answer, were memory the only limit; 0: not measured


def limit_bytes(settings: Settings, free_bytes: int) -> int:
    """What models may take: as the engine's manager counts it."""
    limit = settings.memory_limit or free_bytes
    return max(0, limit - memory.prompt_cache_bytes(settings))


def fits(settings: Settings, available_bytes: int, bytes_per_s: float) -> Iterator[Fit]:
    """For each quantization. A token reads each weight once, so that bandwidth by size bounds the rate."""
    for quantization in QUANTIZATIONS:
        for shape in SHAPES:
            info = shape.info(quantization)
            plan = memory.plan(info, settings, available_bytes, squeeze=True)
            if plan is not None:
                yield Fit(shape.name, quantization, info.size_bytes, plan, bytes_per_s / info.size_bytes)
                break
