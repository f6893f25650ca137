"""From a header to ModelInfo: what a model can do, and the sizes that its memory is computed from.

In `metadata`, the texts of the tokens that begin and end a text are added as "tokenizer.ggml.bos_token" and
"tokenizer.ggml.eos_token", and those of all control tokens as "tokenizer.ggml.control_tokens", where "<unused0>" stands
for "<unused6242>" too: `templates.ChatTemplate.of` takes them from there.
"""

from __future__ import annotations

import math
import re
from collections import Counter

from rustllama.core import Metadata, ModelInfo
from rustllama.gguf import architectures
from rustllama.gguf.header import Header, Scalar, Tensor, Value
from rustllama.gguf.keys import Keys, printable

_DIGITS = re.compile(r"\d+")
_CONTROL, _UNKNOWN = 3, 2  # token types
_LONG_LIST = 64  # elements; longer ones stay out of the metadata
_VOCABULARY = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores", "tokenizer.ggml.merges")
_FILE_TYPES = """
F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS
Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0 Q2_0
"""
_FILE_TYPE_NAMES = dict(enumerate(_FILE_TYPES.split()))  # llama.h, enum llama_ftype


def describe(keys: Keys, headers: list[Header], tensors: list[Tensor]) -> ModelInfo:
    architecture, width = keys.architecture, keys.number("embedding_length", 0)
    heads = keys.per_block("attention.head_count", 0)
    heads_kv = keys.per_block("attention.head_count_kv", 0) if keys.get("attention.head_count_kv") else heads
    key_length, value_length = _head_lengths(keys, width // heads[0] if heads[0] else 0)
    marked = keys.per_block("attention.recurrent_layers", 0) if keys.get("attention.recurrent_layers") else []
    recurrent = architectures.recurrent_blocks(
        architecture, keys.number, heads_kv, marked, keys.per_block("feed_forward_length", 0)
    )
    floats = architectures.state_floats(architecture, keys.number, heads[0], key_length)
    return ModelInfo(
        architecture=architecture,
        parameter_count=sum(tensor.elements for tensor in tensors),
        quantization=_quantization(keys, tensors),
        size_bytes=sum(header.size_bytes for header in headers),
        parts=tuple(str(header.path) for header in headers),
        block_count=keys.number("block_count", 0),
        context_length=keys.number("context_length", 0),
        embedding_length=width,
        head_count=heads[0],
        head_count_kv=architectures.kv_heads(architecture, keys.number, heads_kv, recurrent),
        key_length=key_length,
        value_length=value_length,
        vocabulary_size=len(keys.tokens()),
        sliding_window=architectures.sliding_window(architecture, keys.number),
        recurrent_state_bytes=4 * floats * sum(recurrent),
        chat_template=_text(keys.get("tokenizer.chat_template")),
        license=_text(keys.get("general.license")),
        capabilities=_capabilities(keys),
        metadata=_metadata(keys),
    )


def _text(value: Value | None) -> str | None:
    return value if isinstance(value, str) and value else None


def _head_lengths(keys: Keys, usual: int) -> tuple[int, int]:
    """Channels of a key and of a value, the larger where blocks differ; latent attention caches keys alone."""
    key = max(keys.number("attention.key_length", usual), keys.number("attention.key_length_swa", 0))
    value = max(keys.number("attention.value_length", usual), keys.number("attention.value_length_swa", 0))
    return key, 0 if keys.number("attention.key_length_mla", 0) else value


def _quantization(keys: Keys, tensors: list[Tensor]) -> str:
    name = _FILE_TYPE_NAMES.get(keys.number("general.file_type", -1), "-")
    if name != "-":
        return name
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type_name] += tensor.elements
    return sizes.most_common(1)[0][0]


def _capabilities(keys: Keys) -> tuple[str, ...]:
    if keys.architecture in architectures.ENCODERS or keys.number("pooling_type", 0) > 0:
        return ("embedding",)
    return ("completion", "chat")


def _metadata(keys: Keys) -> Metadata:
    metadata: dict[str, Scalar | list[Scalar]] = {}
    for key, value in keys.values.items():
        if not isinstance(value, list):
            metadata[key] = _storable(value)
        elif len(value) <= _LONG_LIST and key not in _VOCABULARY:
            metadata[key] = [_storable(element) for element in value]
    for name in ("bos", "eos"):
        metadata[f"tokenizer.ggml.{name}_token"] = printable(keys.token(f"tokenizer.ggml.{name}_token_id"))
    metadata["tokenizer.ggml.control_tokens"] = _control_tokens(keys)
    return metadata


def _control_tokens(keys: Keys) -> list[Scalar]:
    types = keys.get("tokenizer.ggml.token_type")
    pairs = zip(keys.tokens(), types if isinstance(types, list) else [], strict=False)
    special = (token for token, kind in pairs if token and kind in (_CONTROL, _UNKNOWN))
    return sorted({_DIGITS.sub("0", printable(token)) for token in special})


def _storable(value: Scalar) -> Scalar:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
