"""Owns the GGUF of the bundled model: its metadata, tokenizer and weights. Training only."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer

from rustllama.demo.model import Llama, Shape
from rustllama.demo.tokens import END, PAD, SPECIAL
from rustllama.templates import CHATML

DESCRIPTION = (
    "A tiny demo model that ships with rustllama: usage questions, capitals, small sums. It is no assistant, and says "
    "so when asked for anything else."
)

_JOINT = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up": ("ffn_gate", "ffn_up")}


def write(path: Path, network: Llama, tokenizer: Tokenizer, *, context_length: int) -> None:
    """Writes the network as a Llama in F16 (norms in F32) with its tokenizer and chat template."""
    writer = gguf.GGUFWriter(str(path), "llama")
    _add_metadata(writer, network.shape, context_length)
    _add_tokenizer(writer, tokenizer)
    _add_weights(writer, network)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, context_length: int) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("rustllama demo")
    writer.add_description(DESCRIPTION)
    writer.add_author("The rustllama authors")
    writer.add_license("MIT")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context_length)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_heads)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_float32("general.sampling.temp", 0.0)  # so small a model has one good answer


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    texts = sorted(vocabulary, key=lambda text: int(vocabulary[text]))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([gguf.TokenType.CONTROL if text in SPECIAL else gguf.TokenType.NORMAL for text in texts])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(vocabulary[END])
    writer.add_eot_token_id(vocabulary[END])
    writer.add_pad_token_id(vocabulary[PAD])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def _add_weights(writer: gguf.GGUFWriter, network: Llama) -> None:
    for name, weight in network.state_dict().items():
        array = weight.detach().numpy().astype(np.float32 if weight.dim() == 1 else np.float16)
        for part, piece in _parts(name, array):
            writer.add_tensor(part, np.ascontiguousarray(piece))


def _parts(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """A tensor under llama.cpp's names: the joint matrices of the network are separate ones there."""
    for joint, names in _JOINT.items():
        if f".{joint}." in name:
            pieces = np.split(array, len(names))
            return [(name.replace(joint, part), piece) for part, piece in zip(names, pieces, strict=True)]
    return [(name, array)]
