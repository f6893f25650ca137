"""Proves a model file in a child process: what kills llama.cpp kills the child, and becomes a sentence.

The child (`probe_child`) bounds itself: its memory and processor time by the kernel's limits, its time by the kernel's
alarm. So waiting for it is one call that always ends, and nothing is left behind.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from rustllama.errors import BadModelFile, InternalError, OutOfMemory

CHILD = (sys.executable, "-m", "rustllama.probe_child")

_LONGEST_WORDS = 300  # characters of llama.cpp's that a sentence quotes
_ENVIRONMENT = {  # a GPU's driver reserves more addresses than the limit leaves
    "GGML_NO_BACKTRACE": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "",
}
_KILLED_FOR_MEMORY = (signal.SIGKILL,)
_OUT_OF_TIME = (signal.SIGALRM, signal.SIGXCPU)


class Verdict(msgspec.Struct, frozen=True):
    """What a child prints; neither field where the model is good."""

    bad_model_file: str | None = None
    out_of_memory: str | None = None


def prove(path: Path, *, timeout_s: float, child: Sequence[str] = CHILD) -> None:
    """Loads the model, renders its template, tokenizes and decodes a token, elsewhere. For a worker thread.

    Large files get more time than `timeout_s`. Raises BadModelFile, OutOfMemory or InternalError.
    """
    ended = _run([*child, str(path), str(timeout_s)])
    words = _last_words(ended.stderr)
    if ended.returncode < 0:
        raise _death(path, -ended.returncode, words)
    try:
        verdict = msgspec.json.decode(ended.stdout, type=Verdict)
    except msgspec.DecodeError:
        raise InternalError(f"{path} could not be proved: the child process failed ({words}).") from None
    if verdict.bad_model_file is not None:
        raise BadModelFile(verdict.bad_model_file)
    if verdict.out_of_memory is not None:
        raise OutOfMemory(verdict.out_of_memory)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """In a process group of its own: a terminal's Ctrl+C is not for it."""
    try:
        return subprocess.run(
            command,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
            check=False,
        )
    except OSError as error:
        raise InternalError(f"a model could not be proved in a child process: {error.strerror}.") from error


def _last_words(stderr: bytes) -> str:
    """The line that tells why, without the place where llama.cpp was built."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"GGML_ASSERT|GGML_ABORT|fatal error|what\(\)|Error", line)]
    words = (telling or lines or ["it said nothing"])[-1]
    return re.sub(r"(?<!\S)/\S*/(?=[^/\s]+:\d+)", "", words)[:_LONGEST_WORDS].rstrip(".")


def _death(path: Path, number: int, words: str) -> BadModelFile | OutOfMemory:
    if number in _OUT_OF_TIME:
        return BadModelFile(
            f"{path} did not generate a token in time; if the machine is only slow, raise RUSTLLAMA_PROBE_TIMEOUT."
        )
    if number in _KILLED_FOR_MEMORY or "bad_alloc" in words:
        return OutOfMemory(f"{path} needs more memory than there is; free some, or take a smaller model.")
    name = signal.Signals(number).name
    return BadModelFile(f"{path} kills llama.cpp with {name} ({words}); it is damaged, or made for another version.")
