"""What llama.cpp's architectures remember: which can be served, which blocks keep KV, which a recurrent state.

Follows llama-arch.cpp, llama-hparams.cpp (`n_embd_r`, `n_embd_s`) and models/*.cpp of the llama.cpp in
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable

from rustllama.core import ModelInfo

Number = Callable[[str, int], int]  # a hyperparameter by its name without the architecture, and what it is if absent

_NAMES_OF_GENERATIVE = """
afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bitnet bloom chameleon chatglm
codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 dots1
dots3note ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2 gemma3 gemma3n gemma4
glm-dsa glm4 glm4moe glm5-next gpt-oss gpt2 gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok
grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba kimi-k3 kimi-linear
laguna lfm2 lfm2moe llama llama4 maincoder mamba mamba2 maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2
minimax-m3 mistral3 mistral4 mpt muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe olmo olmo2 olmoe openelm
orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm qwen qwen2 qwen2moe qwen2vl qwen3 qwen35
qwen35moe qwen3moe qwen3next qwen3vl qwen3vlmoe qwen4exp refact rwkv6 rwkv6qwen2 rwkv7 seed_oss smallthinker smollm3
spark2_5 stablelm starcoder starcoder2 step35 talkie xverse
"""
_NAMES_OF_ENCODERS = """
bert eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llama-embed modern-bert neo-bert nomic-bert nomic-bert-moe
"""
GENERATIVE = frozenset(_NAMES_OF_GENERATIVE.split())
ENCODERS = frozenset(_NAMES_OF_ENCODERS.split())
DIFFUSION = frozenset(("dream", "llada", "llada-moe", "rnd1"))
SPEECH = frozenset(("pockettts", "qwen3tts", "wavtokenizer-dec"))
DRAFTS = frozenset(("dflash", "eagle3", "gemma4-assistant"))

_RECURRENT = frozenset(("arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"))
_NAMES_OF_RECURRENT_WHERE_NO_KV = """
bailingmoe3 glm5-next granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe nemotron_h nemotron_h_moe plamo2
"""
_RECURRENT_WHERE_NO_KV = frozenset(_NAMES_OF_RECURRENT_WHERE_NO_KV.split())
_ATTENTION_EVERY = {"minimax-01": 8, "qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4}

# Architectures whose sliding window llama.cpp applies, with the window that it takes when the file names none.
_WINDOWS = {
    **dict.fromkeys(("afmoe", "cohere2", "cohere2moe", "deepseek4", "dots3note", "gemma3", "gemma3n", "gemma4"), 0),
    **dict.fromkeys(("gemma-embedding", "gpt-oss", "granite_swa", "laguna", "lfm2", "maple", "mellum", "mimo2"), 0),
    **dict.fromkeys(("modern-bert", "muse-glimmer", "olmo2", "plamo3", "smallthinker", "spark2_5", "step35"), 0),
    **{"exaone-moe": 128, "exaone4": 4096, "gemma2": 4096, "llama4": 8192},
}

# Architectures that end every key of every layer with a plain rotation by its position. llama.cpp's context shift takes
# it of all others too and is then wrong without a word: some layers do not rotate, or multiply by a norm afterwards.
_NAMES_OF_ROTATING = """
arcee arctic bailingmoe bailingmoe2 chatglm codeshell command-r dbrx deci deepseek dots1 ernie4_5 ernie4_5-moe exaone
falcon gemma glm4 gptneox granite granitemoe grovemoe internlm2 llama minicpm minimax-m2 mistral3 nanbeige nemotron olmo
olmoe orion pangu-embedded phi2 phi3 phimoe qwen qwen2 qwen2moe qwen3 qwen3moe seed_oss stablelm starcoder2 xverse
"""
_ROTATING = frozenset(_NAMES_OF_ROTATING.split())


def can_shift(info: ModelInfo) -> bool:
    """Whether llama.cpp can rightly move the cells of a sequence to other positions (`build_graph_shift`).

    YaRN and LongRoPE also scale the keys, and a shift of one sequence scales those of all sequences once more.
    """
    kind, factor = (info.metadata.get(f"{info.architecture}.rope.scaling.{key}") for key in ("type", "attn_factor"))
    plain = kind in (None, "none", "linear") and factor in (None, 1.0)
    return plain and info.architecture in _ROTATING and not info.sliding_window


def sliding_window(architecture: str, number: Number) -> int:
    """Tokens; 0 is full attention."""
    if architecture not in _WINDOWS:
        return 0
    if architecture == "llama4" and number("attention.sliding_window", -1) != 0:
        return 8192  # chunks, whatever the file says
    return number("attention.sliding_window", _WINDOWS[architecture])


def recurrent_blocks(
    architecture: str, number: Number, heads_kv: list[int], marked: list[int], feed_forward: list[int]
) -> list[bool]:
    """Which blocks carry a recurrent state; `marked` is the file's own list, if it has one."""
    count = len(heads_kv)
    if architecture in _RECURRENT or architecture == "falcon-h1":
        return [True] * count
    if architecture in ("nemotron_h", "nemotron_h_moe"):
        return [kv == 0 and ff == 0 for kv, ff in zip(heads_kv, feed_forward, strict=True)]
    if architecture in _RECURRENT_WHERE_NO_KV:
        return [kv == 0 for kv in heads_kv]
    if architecture in _ATTENTION_EVERY:
        if marked:
            return [bool(mark) for mark in marked]
        every = max(1, number("full_attention_interval", _ATTENTION_EVERY[architecture]))
        own = count - number("nextn_predict_layers", 0)
        return [block < own and (block + 1) % every != 0 for block in range(count)]
    return [False] * count


def kv_heads(architecture: str, number: Number, heads_kv: list[int], recurrent: list[bool]) -> tuple[int, ...]:
    """`heads_kv` with 0 for the blocks that keep no KV cache."""
    if architecture in _RECURRENT:
        return (0,) * len(heads_kv)
    keeping = len(heads_kv)
    if architecture == "gemma3n":
        keeping = 20
    elif architecture == "gemma4":
        keeping -= number("attention.shared_kv_layers", 0)
    hybrid = architecture in _ATTENTION_EVERY
    return tuple(
        0 if block >= keeping or (hybrid and recurrent[block]) else heads for block, heads in enumerate(heads_kv)
    )


def state_floats(architecture: str, number: Number, heads: int, key_length: int) -> int:
    """Numbers (of 4 bytes) in the recurrent state of one block and sequence."""
    width = number("embedding_length", 0)
    convolution = max(0, number("ssm.conv_kernel", 0) - 1)
    if head_size := number("wkv.head_size", 0):
        return width * (number("token_shift_count", 2) + head_size)
    if kernel := number("shortconv.l_cache", 0):
        return width * (kernel - 1)
    if head_dim := number("kda.head_dim", 0):
        return 3 * (convolution or 3) * heads * head_dim + head_dim * head_dim * heads
    if architecture == "minimax-01":
        return key_length * key_length * heads
    inner, states = number("ssm.inner_size", 0), number("ssm.state_size", 0)
    return convolution * (inner + 2 * number("ssm.group_count", 0) * states) + states * inner
