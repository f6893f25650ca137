"""Why a model file cannot be served: other things than language models, and headers that are known to kill llama.cpp.

Each check raises BadModelFile with one sentence. GGML_ASSERT does not raise: most of what is refused here would end the
process.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from rustllama.errors import BadModelFile
from rustllama.gguf import architectures
from rustllama.gguf.header import Tensor
from rustllama.gguf.keys import Keys, printable

_MOST_BLOCKS, _MOST_EXPERTS = 512, 1024
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_NOT_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")


def check_kind(keys: Keys) -> None:
    """Other things than language models come as GGUF too."""
    path, architecture, kind = keys.path, keys.architecture, keys.text("general.type", "model")
    if kind == "mmproj" or architecture == "clip":
        raise BadModelFile(f"{path} is a vision projector (mmproj); name the language model that it belongs to.")
    if kind == "adapter" or architecture == "controlvector":
        raise BadModelFile(f"{path} is a LoRA or another adapter, not a model; merge it into its base model first.")
    if kind == "imatrix":
        raise BadModelFile(f"{path} is an importance matrix, which is made for quantising; name a model.")
    if not architecture:
        raise keys.bad("it has no general.architecture")
    if architecture in architectures.GENERATIVE | architectures.ENCODERS:
        return
    others = {"diffusion language": architectures.DIFFUSION, "speech": architectures.SPEECH}
    for name, group in {**others, "draft": architectures.DRAFTS, "encoder-decoder": {"t5", "t5encoder"}}.items():
        if architecture in group:
            raise BadModelFile(f"{path} is a {name} model ('{architecture}'), which rustllama cannot serve.")
    raise BadModelFile(
        f"{path} has the architecture {architecture[:40]!r}, which this llama.cpp does not know; "
        "a newer llama-cpp-python may."
    )


def check_hyperparameters(keys: Keys) -> None:
    """What GGML_ASSERT would end the process for."""
    blocks = keys.number("block_count", 0)
    if not 0 < blocks <= _MOST_BLOCKS:
        raise keys.bad(f"block_count is {blocks}, not 1 to {_MOST_BLOCKS}")
    if not 0 <= keys.number("nextn_predict_layers", 0) <= blocks:
        raise keys.bad("nextn_predict_layers is more than block_count")
    for key in ("embedding_length", "context_length"):
        if not 0 < keys.number(key, 0) < 1 << 31:
            raise keys.bad(f"{key} is {keys.number(key, 0)}")
    if (scaling := keys.text("rope.scaling.type", "none")) not in _ROPE_SCALINGS:
        raise keys.bad(f"rope.scaling.type is {scaling[:40]!r}, not one of {', '.join(_ROPE_SCALINGS)}")
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        if not 0 <= keys.real(key, 0.0) < math.inf:
            raise keys.bad(f"{key} is {keys.real(key, 0.0)}")
    _check_experts(keys)


def _check_experts(keys: Keys) -> None:
    experts, groups = keys.number("expert_count", 0), keys.number("expert_group_count", 0)
    used, groups_used = max(keys.per_block("expert_used_count", 0)), keys.number("expert_group_used_count", 0)
    if keys.architecture in ("hunyuan_vl", "hunyuan-dense") and experts <= 1:
        experts = used = 0
    consistent = 0 <= used <= experts <= _MOST_EXPERTS and (used > 0) == (experts > 0)
    grouped = groups < max(1, experts)
    if groups > 1:
        grouped = grouped and experts % groups == 0 and 0 < groups_used < groups
    if not consistent or not grouped:
        raise keys.bad(f"its experts are inconsistent ({used} used of {experts}, {groups_used} groups of {groups})")


def check_vocabulary(keys: Keys) -> None:
    tokens = keys.tokens()
    if not tokens:
        raise keys.bad("it has no vocabulary")
    filled = [token for token in tokens if token]
    if len(set(filled)) != len(filled):
        twice = Counter(filled).most_common(1)[0][0]
        raise keys.bad(f"the token {printable(twice)[:40]!r} is in its vocabulary twice")
    if keys.text("tokenizer.ggml.model", "") == "llama":
        _check_byte_tokens(keys, set(tokens))


def _check_byte_tokens(keys: Keys, tokens: set[str]) -> None:
    """SentencePiece falls back to bytes: llama.cpp throws through C when a prompt needs one that is not there."""
    for code in set(range(256)) - _NOT_IN_UTF8:
        if f"<0x{code:02X}>" not in tokens and bytes([code]).decode("utf-8", "surrogateescape") not in tokens:
            raise keys.bad(f"its SentencePiece vocabulary has no token for the byte {code}")


def check_tensors(path: Path, architecture: str, tensors: list[Tensor]) -> None:
    if not tensors:
        raise BadModelFile(f"{path} holds a vocabulary but no weights; name the model itself.")
    names = Counter(tensor.name for tensor in tensors)
    if len(names) != len(tensors):
        raise BadModelFile(f"{path} has the tensor {names.most_common(1)[0][0]!r} twice; download it again.")
    for tensor in tensors:
        table = architecture == "deepseek4" and tensor.name.endswith(".ffn_gate_tid2eid")
        if tensor.type_name in _NO_WEIGHTS and not table:
            raise BadModelFile(
                f"{path} has the tensor {tensor.name!r} of type {tensor.type_name}, where weights belong; "
                "it is damaged or badly converted."
            )
