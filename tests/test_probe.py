"""Proving model files in a child process: good ones pass, and every way to fail becomes a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rustllama.errors import BadModelFile, InternalError, OutOfMemory, RustllamaError
from rustllama.probe import prove
from tests.conftest import SHAPES
from tests.toys import ToyShape, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("probe") / "toy.gguf")


def failure(path: Path, python: str, timeout_s: float = 60) -> RustllamaError:
    """The error for a child that runs this instead."""
    with pytest.raises(RustllamaError) as caught:
        prove(path, timeout_s=timeout_s, child=(sys.executable, "-c", python))
    return caught.value


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_good_models_pass(tmp_path: Path, shape: ToyShape) -> None:
    prove(write_toy(tmp_path / "toy.gguf", shape), timeout_s=60)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="There is no file"):
        prove(tmp_path / "none.gguf", timeout_s=60)


def test_the_header_is_checked_before_llama_cpp_sees_it(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(toy.read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match="is truncated"):
        prove(tmp_path / "cut.gguf", timeout_s=60)


def test_what_llama_cpp_refuses_is_told(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(toy.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(BadModelFile, match="could not load"):
        prove(tmp_path / "bad.gguf", timeout_s=60)


def test_a_template_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", chat_template="{% if %}")
    with pytest.raises(BadModelFile, match=r"toy\.gguf cannot be served: The chat template cannot be read"):
        prove(path, timeout_s=60)


def test_a_template_that_never_ends_is_refused_in_time(tmp_path: Path) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    path = write_toy(tmp_path / "toy.gguf", chat_template=loop)
    with pytest.raises(BadModelFile, match="did not generate a token in time"):
        prove(path, timeout_s=1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits addresses")
def test_a_template_that_eats_memory_is_refused(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", chat_template="{{ 'x' * 10 ** 11 }}")
    with pytest.raises(BadModelFile, match="cannot be served"):
        prove(path, timeout_s=60)


def test_a_model_that_computes_no_number_is_refused(toy: Path, tmp_path: Path) -> None:
    data = bytearray(toy.read_bytes())
    ones = np.ones(64, np.float32).tobytes()  # of a norm
    data = data.replace(ones, np.full(64, np.nan, np.float32).tobytes())
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(BadModelFile, match="computes no finite number"):
        prove(tmp_path / "nan.gguf", timeout_s=60)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE"])
def test_a_crash_is_told_with_its_signal_and_last_words(toy: Path, name: str) -> None:
    words = "/build/vendor/src/model.cpp:12: GGML_ASSERT(n > 0) failed"
    program = f"import os, signal, sys; sys.stderr.write('loading\\n{words}\\nbye\\n'); sys.stderr.flush(); "
    error = failure(toy, program + f"os.kill(os.getpid(), signal.{name})")
    assert isinstance(error, BadModelFile)
    assert str(error).startswith(f"{toy} kills llama.cpp with {name} (model.cpp:12: GGML_ASSERT(n > 0) failed)")


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.kill(os.getpid(), 9)",
        "import os, sys; print('  what():  std::bad_alloc', file=sys.stderr, flush=True); os.abort()",
    ],
)
def test_a_lack_of_memory_is_not_the_models_fault(toy: Path, program: str) -> None:
    assert isinstance(failure(toy, program), OutOfMemory)


@pytest.mark.parametrize("program", ["raise SystemError('broken child')", "print('no verdict')", "pass"])
def test_a_child_that_says_nothing_useful_is_our_fault(toy: Path, program: str) -> None:
    assert isinstance(failure(toy, program), InternalError)


def test_a_child_that_cannot_start_is_our_fault(toy: Path) -> None:
    with pytest.raises(InternalError, match="No such file or directory"):
        prove(toy, timeout_s=60, child=("/no/such/program",))


def test_no_child_is_left_behind(toy: Path) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    failure(toy, "import os; os.abort()")
    assert children.read_text() == before


def test_the_limits_of_the_child_grow_with_the_file_and_it_leaves_first() -> None:
    program = (
        "import resource, signal; from pathlib import Path; from rustllama.probe_child import limit;"
        "limit(7.0); limit(7.0, 1_000_000_000); score = Path('/proc/self/oom_score_adj');"
        "print(*(resource.getrlimit(what)[0] for what in (resource.RLIMIT_CPU, resource.RLIMIT_CORE)),"
        " round(signal.getitimer(signal.ITIMER_REAL)[0]), resource.getrlimit(resource.RLIMIT_AS)[0],"
        " score.read_text() if score.exists() else '')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    time_and_core, of_linux = done.stdout.split()[:3], done.stdout.split()[3:]
    assert time_and_core == ["35", "0", "17"], done.stderr
    assert sys.platform != "linux" or of_linux == [str(2_000_000_000 + (8 << 30)), "1000"]


def test_the_child_does_not_load_gevent_or_flask() -> None:
    program = "import sys, rustllama.probe_child; print(sorted({'gevent', 'flask', 'peewee'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
