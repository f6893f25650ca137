"""Writes random-weight GGUFs: small exact ones for tests of equality, big shaped ones for benchmarks.

In a test:           write_toy(path)   write_toy(path, GEMMA3)   write_toy(path, LLAMA, seed=7, chat_template="...")
For a benchmark:     python -m tests.toys 135M /where/135m.gguf [Q4_K_M | Q4_0 | quoting]

The weights are scaled so that greedy text depends on the whole prompt, and the output head is the model's own (tied
ones only echo the last token). Channel 0 of the residual stream is a constant that no block writes to; the head's rows
of the control tokens read it alone, so their logits are about `control_logit`: far below all others unless asked for.
"""

from __future__ import annotations

import itertools
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf.quants import quant_shape_to_byte_shape, quantize

from rustllama.templates import CHATML as CHATML

Array = npt.NDArray[Any]

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2: beginning, turn, end of generation
_CONSTANT = 4.0
_NEXT_TO_NOTHING = 1e-6
_EMBEDDING = 0  # its place in the file


@dataclass(frozen=True, slots=True)
class ToyShape:
    """What to write; lengths in tokens or channels."""

    architecture: str = "llama"  # or "gemma3" (sliding window), "mamba" (recurrent), "jamba" (recurrent, attends, ...)
    quantization: str = "F32"  # of the matrices: F32, F16, Q8_0, Q4_0 ...
    layers: int = 3
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 128
    vocabulary: int = 512
    context_length: int = 2048
    sliding_window: int = 64  # gemma3: five blocks with it, then one without
    tokenizer: str = "bpe"  # "bpe" over bytes or "spm" (SentencePiece)
    byte_tokens: bool = True  # False spoils an "spm" one
    add_bos: bool = False
    chat_template: str | None = None
    control_logit: float = -30.0
    period: int = 0  # of greedy text: each token is followed by the next of so many, and nothing else counts
    seed: int = 0


LLAMA = ToyShape()
GEMMA3 = ToyShape(architecture="gemma3", layers=6)
MAMBA = ToyShape(architecture="mamba")
JAMBA = ToyShape(architecture="jamba")
SHAPES = {
    "135M": ToyShape("llama", "Q8_0", 30, 576, 9, 3, 1536, 49152, 8192, chat_template=CHATML),
    "1B": ToyShape("llama", "Q8_0", 16, 2048, 32, 8, 8192, 128256, 8192, chat_template=CHATML),
}


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A weight to write: random with `std`, or what `make` says."""

    name: str
    shape: tuple[int, ...]  # rows first, as NumPy has it
    std: float = 0.0
    silent_row: bool = False  # writes into the residual stream: leaves channel 0 alone
    make: Callable[[np.random.Generator], Array] | None = None


def write_toy(path: Path, shape: ToyShape = LLAMA, **changes: Any) -> Path:
    """Writes the model of `shape`, with `changes` to its fields, and returns `path`."""
    shape = replace(shape, **changes)
    writer = gguf.GGUFWriter(str(path), shape.architecture)
    _add_hyperparameters(writer, shape)
    _add_vocabulary(writer, shape)
    kind = gguf.GGMLQuantizationType[shape.quantization]
    weights = list(_weights(shape))
    for weight in weights:
        _announce(writer, weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, weight in enumerate(weights):
        writer.write_tensor_data(_data(weight, kind, _rng(shape, number)))
    writer.close()
    return path


def _add_hyperparameters(writer: gguf.GGUFWriter, shape: ToyShape) -> None:
    writer.add_name("toy")
    writer.add_float32("general.sampling.temp", 0.0)  # or an answer would end by chance in the middle of a test
    mix = "ALL_F32" if shape.quantization == "F32" else f"MOSTLY_{shape.quantization}"
    writer.add_file_type(gguf.LlamaFileType[mix])
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.architecture in ("mamba", "jamba"):
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * shape.width)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(shape.width // 16)
    if shape.architecture == "mamba":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        return
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    by_block = [shape.kv_heads * _attends(shape, layer) for layer in range(shape.layers)]
    writer.add_head_count_kv(by_block if shape.architecture == "jamba" else shape.kv_heads)
    writer.add_key_length(shape.width // shape.heads)
    writer.add_value_length(shape.width // shape.heads)
    writer.add_rope_freq_base(10000.0)
    if shape.architecture == "gemma3":
        writer.add_sliding_window(shape.sliding_window)


def _add_vocabulary(writer: gguf.GGUFWriter, shape: ToyShape) -> None:
    tokens, types = _spm_tokens(shape) if shape.tokenizer == "spm" else _bpe_tokens(shape)
    writer.add_tokenizer_model("llama" if shape.tokenizer == "spm" else "gpt2")
    writer.add_tokenizer_pre("default" if shape.tokenizer == "spm" else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if shape.tokenizer == "spm":
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    else:
        writer.add_token_merges([f"Ġ {letter}" for letter in string.ascii_lowercase])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(shape.add_bos)
    if shape.chat_template is not None:
        writer.add_chat_template(shape.chat_template)


def _bpe_tokens(shape: ToyShape) -> tuple[list[str], list[gguf.TokenType]]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
    words = ["Ġ" + letter for letter in string.ascii_lowercase] + list(_fillers("Ġ", shape.vocabulary))
    return _with_types([*alphabet, *words], [], shape.vocabulary)


def _spm_tokens(shape: ToyShape) -> tuple[list[str], list[gguf.TokenType]]:
    codes = [f"<0x{byte:02X}>" for byte in range(256)] if shape.byte_tokens else []
    words = ["▁", *string.printable[:94], *_fillers("▁", shape.vocabulary)]
    return _with_types(words, codes, shape.vocabulary)


def _fillers(space: str, count: int) -> Iterator[str]:
    words = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    return (space + word for word in itertools.islice(words, count))


def _with_types(words: list[str], codes: list[str], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    tokens = [*CONTROL_TOKENS, *codes, *words][:size]
    kinds = gguf.TokenType
    types = [kinds.CONTROL] * len(CONTROL_TOKENS) + [kinds.BYTE] * len(codes) + [kinds.NORMAL] * len(words)
    return tokens, types[:size]


def _weights(shape: ToyShape) -> Iterator[_Matrix]:
    width, size = shape.width, (shape.vocabulary, shape.width)
    loudness = width**-0.5 if shape.architecture == "gemma3" else 1.0  # gemma3 multiplies by sqrt(width) itself

    def embedding(rng: np.random.Generator) -> Array:
        rows = rng.standard_normal(size, dtype=np.float32)
        rows[:, 0] = _CONSTANT
        return rows * np.float32(loudness)

    def head(rng: np.random.Generator) -> Array:
        rows = (_rng(shape, _EMBEDDING) if shape.period else rng).standard_normal(size, dtype=np.float32)
        rows = (rows[_before(shape)] if shape.period else rows) * np.float32(2 / width**0.5)
        rows[:, 0] = 0
        rows[: len(CONTROL_TOKENS)] = 0
        rows[: len(CONTROL_TOKENS), 0] = shape.control_logit
        return rows

    yield _Matrix("token_embd.weight", size, make=embedding)
    for layer in range(shape.layers):
        for weight in _block(shape, layer):
            std = _NEXT_TO_NOTHING if shape.period and weight.silent_row else weight.std
            yield replace(weight, name=f"blk.{layer}.{weight.name}", std=std)
    yield _Matrix("output_norm.weight", (width,), make=_ones(width))
    yield _Matrix("output.weight", size, make=head)


def _rng(shape: ToyShape, number: int) -> np.random.Generator:
    """Of a weight by its place in the file."""
    return np.random.default_rng([shape.seed, number])


def _before(shape: ToyShape) -> Array:
    """The token that each one follows."""
    tokens = np.arange(shape.vocabulary)
    place = (tokens - len(CONTROL_TOKENS)) % shape.period
    return np.where(place, tokens - 1, np.minimum(tokens + shape.period, shape.vocabulary) - 1)


def _attends(shape: ToyShape, layer: int) -> bool:
    return shape.architecture != "mamba" and (shape.architecture != "jamba" or layer % 2 == 1)


def _block(shape: ToyShape, layer: int) -> Iterator[_Matrix]:
    yield from _attention(shape) if _attends(shape, layer) else _mamba(shape)
    if shape.architecture != "mamba":
        yield from _feed_forward(shape)


def _attention(shape: ToyShape) -> Iterator[_Matrix]:
    width, head = shape.width, shape.width // shape.heads
    yield _Matrix("attn_norm.weight", (width,), make=_ones(width))
    yield _Matrix("attn_q.weight", (width, width), 1.6 * width**-0.5)
    yield _Matrix("attn_k.weight", (shape.kv_heads * head, width), 1.6 * width**-0.5)
    yield _Matrix("attn_v.weight", (shape.kv_heads * head, width), 2 * width**-0.5)
    yield _Matrix("attn_output.weight", (width, width), 2 * width**-0.5, silent_row=True)
    if shape.architecture == "gemma3":
        yield _Matrix("attn_q_norm.weight", (head,), make=_ones(head, 2.0))
        yield _Matrix("attn_k_norm.weight", (head,), make=_ones(head, 2.0))
        yield _Matrix("post_attention_norm.weight", (width,), make=_ones(width))
        yield _Matrix("post_ffw_norm.weight", (width,), make=_ones(width, 1.5))


def _feed_forward(shape: ToyShape) -> Iterator[_Matrix]:
    width, feed_forward = shape.width, shape.feed_forward
    # below 10, llama.cpp's GELU goes through half precision, which makes leaps of roundings
    gate = 200 if shape.architecture == "gemma3" else 2
    yield _Matrix("ffn_norm.weight", (width,), make=_ones(width))
    yield _Matrix("ffn_gate.weight", (feed_forward, width), gate * width**-0.5)
    yield _Matrix("ffn_up.weight", (feed_forward, width), width**-0.5)
    yield _Matrix("ffn_down.weight", (width, feed_forward), feed_forward**-0.5, silent_row=True)


def _mamba(shape: ToyShape) -> Iterator[_Matrix]:
    width, inner, states, rank = shape.width, 2 * shape.width, 16, shape.width // 16
    loudness = 0.1 if shape.architecture == "jamba" else 0.02  # beside attention and feed-forward
    decay = -np.geomspace(0.002, 0.2, states, dtype=np.float32)
    yield _Matrix("attn_norm.weight", (width,), make=_ones(width))
    yield _Matrix("ssm_in.weight", (2 * inner, width), width**-0.5)
    yield _Matrix("ssm_conv1d.weight", (inner, 4), make=lambda rng: rng.standard_normal((inner, 4), np.float32))
    yield _Matrix("ssm_conv1d.bias", (inner,), make=_ones(inner, 0.1))
    yield _Matrix("ssm_x.weight", (rank + 2 * states, inner), inner**-0.5)
    yield _Matrix("ssm_dt.weight", (inner, rank), rank**-0.5)
    yield _Matrix("ssm_dt.bias", (inner,), make=_ones(inner, 0.1))
    yield _Matrix("ssm_a", (inner, states), make=lambda _rng: np.tile(decay, (inner, 1)))
    yield _Matrix("ssm_d", (inner,), make=_ones(inner))
    yield _Matrix("ssm_out.weight", (width, inner), loudness * inner**-0.5, silent_row=True)
    if shape.architecture == "jamba":
        yield _Matrix("ssm_dt_norm.weight", (rank,), make=_ones(rank))
        yield _Matrix("ssm_b_norm.weight", (states,), make=_ones(states))
        yield _Matrix("ssm_c_norm.weight", (states,), make=_ones(states))


def _ones(count: int, times: float = 1.0) -> Callable[[np.random.Generator], Array]:
    return lambda _rng: np.full(count, times, np.float32)


def _kind_of(weight: _Matrix, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    matrix = weight.std or weight.name in ("token_embd.weight", "output.weight")
    return kind if matrix and weight.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32


def _announce(writer: gguf.GGUFWriter, weight: _Matrix, kind: gguf.GGMLQuantizationType) -> None:
    own = _kind_of(weight, kind)
    shape = quant_shape_to_byte_shape(weight.shape, own)
    writer.add_tensor_info(weight.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=own)


def _data(weight: _Matrix, kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> Array:
    own = _kind_of(weight, kind)
    if weight.make is None and own == gguf.GGMLQuantizationType.Q8_0:
        return _random_q8(weight, rng)
    values = weight.make(rng) if weight.make else rng.standard_normal(weight.shape, np.float32) * np.float32(weight.std)
    if weight.silent_row:
        values[0] = 0
    return quantize(values, own).view(np.uint8)


def _random_q8(weight: _Matrix, rng: np.random.Generator) -> Array:
    """Blocks of Q8_0 as llama.cpp keeps them, a half-precision scale and 32 bytes: no floats in between."""
    rows, columns = weight.shape
    blocks = np.empty((rows, columns // 32, 34), np.uint8)
    blocks[:, :, 2:] = rng.integers(-127, 128, (rows, columns // 32, 32), np.int8).view(np.uint8)
    blocks[:, :, :2] = np.array([weight.std / 73.3], np.float16).view(np.uint8)  # 73.3: their standard deviation
    if weight.silent_row:
        blocks[0] = 0
    return blocks


def _requantize(path: Path, kind: str) -> None:
    """What Python cannot write, llama.cpp does (llama_model_quantize)."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    whole = path.rename(path.with_suffix(".whole"))
    assert llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), params) == 0
    whole.unlink()


if __name__ == "__main__":
    name, path, *kind = sys.argv[1:]
    write_toy(Path(path), SHAPES[name], period=50 if kind == ["quoting"] else 0)
    if kind in (["Q4_0"], ["Q4_K_M"]):
        _requantize(Path(path), kind[0])
