"""The child process of `probe`: does with a model once all that a request will do, and prints a verdict.

usage: python -m rustllama.probe_child PATH TIMEOUT_S
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from rustllama import gguf
from rustllama.core import ModelInfo
from rustllama.errors import BadModelFile, InternalError, OutOfMemory, TemplateRefused
from rustllama.probe import Verdict
from rustllama.rlimits import give_way, leave_first, lower
from rustllama.templates import ChatTemplate

_N_CTX, _N_BATCH = 256, 64
_THREADS = 2
_NICE = 10
_SLOWEST_DISK = 100_000_000  # bytes a second
_SPARE_MEMORY = 8 << 30  # bytes of addresses beside twice the file: it is mapped, and its weights may be repacked


def main(path: str, timeout_s: str) -> None:
    """Prints a Verdict; a death by signal is one too."""
    give_way(_NICE)
    limit(float(timeout_s))
    try:
        info = gguf.read(Path(path))
        limit(float(timeout_s), info.size_bytes)
        _use(info, path)
        verdict = Verdict()
    except BadModelFile as error:
        verdict = Verdict(bad_model_file=str(error))
    except (TemplateRefused, InternalError) as error:
        verdict = Verdict(bad_model_file=f"{path} cannot be served: {error}")
    except OutOfMemory as error:
        verdict = Verdict(out_of_memory=str(error))
    sys.stdout.write(msgspec.json.encode(verdict).decode())
    sys.stdout.flush()
    os._exit(0)  # llama.cpp's destructors prove nothing


def limit(timeout_s: float, file_bytes: int = 0) -> None:
    """From here on the kernel ends this process when it takes too much, and first when memory is short."""
    seconds = timeout_s + file_bytes / _SLOWEST_DISK
    signal.setitimer(signal.ITIMER_REAL, seconds)
    lower(resource.RLIMIT_CPU, int(_THREADS * seconds) + 1)
    lower(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        lower(resource.RLIMIT_AS, 2 * file_bytes + _SPARE_MEMORY)
    leave_first()


def _use(info: ModelInfo, path: str) -> None:
    from rustllama.engine.native import Context, Model  # after the limits: loading libraries is part of the risk

    spans = ChatTemplate.of(info).render([{"role": "user", "content": "hello"}])
    model = Model(path, num_gpu=0)
    tokens = [token for span in spans for token in model.tokenize(span.text, parse_special=span.trusted)]
    if "completion" not in info.capabilities:
        return
    context = Context(model, n_ctx=_N_CTX, n_slots=1, n_batch=_N_BATCH, n_threads=_THREADS)
    prompt = (tokens or [0])[:_N_BATCH]
    context.decode(prompt, range(len(prompt)), [0] * len(prompt), [False] * (len(prompt) - 1) + [True])
    _check(path, context.logits(len(prompt) - 1))
    context.decode(prompt[:1], [len(prompt)], [0], True)
    _check(path, context.logits(0))


def _check(path: str, logits: Iterable[float]) -> None:
    if not any(map(math.isfinite, logits)):
        raise BadModelFile(f"{path} computes no finite number; it is damaged or badly converted.")


if __name__ == "__main__":
    main(*sys.argv[1:])
