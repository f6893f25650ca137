"""What a process writes of its doings before it dies: models without a token, requests inside, last words."""

from __future__ import annotations

import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rustllama.core import FileIdentity, GenerateRequest, LoadOptions, MemoryPlan
from rustllama.engine.black_box import BlackBox, Call, Evidence, Mark, Witness, _Value
from rustllama.engine.engine import LlamaEngines
from rustllama.engine.sequence import Sequence
from rustllama.errors import BadModelFile
from rustllama.settings import Settings
from tests.test_engine_lane import ask, last, record, until_idle
from tests.test_registry import record as record_named

OTHERS_WORDS = """
import ctypes, os
from rustllama.engine.black_box import BlackBox
box = BlackBox()
child = os.fork()
if not child:
    from llama_cpp import _ggml
    from rustllama.engine.native import listen
    listen(box.say)
    _ggml.libggml.ggml_abort(b"/src/ops.cpp", 7, b"GGML_ASSERT(%s) failed", b"n > 0")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), box.read().words)
"""


class Nobody:
    def put(self, item: object) -> None:
        pass


def sequence(id: str) -> Sequence:
    return Sequence(GenerateRequest(id, (1, 2), 16), Nobody(), 0)


@pytest.fixture
def box() -> BlackBox:
    return BlackBox()


def requests(box: BlackBox) -> list[str] | None:
    call = box.read().call
    return None if call is None else call.requests


def test_who_did_nothing_left_nothing(box: BlackBox) -> None:
    assert box.read() == Evidence()


def test_a_process_that_serves_says_so(box: BlackBox) -> None:
    box.ready()
    assert box.read().ready


def test_the_requests_that_run_are_told_until_nothing_is_to_do(box: BlackBox) -> None:
    witness = Witness(box, record_named("toy"))
    a, b = sequence("a"), sequence("b")
    for running, ids in (([a, b], ["a", "b"]), ([a, b], ["a", "b"]), ([b], ["b"])):
        witness.works_for(running)
        assert requests(box) == ids
    witness.rests()
    assert requests(box) is None


def test_two_models_take_turns(box: BlackBox) -> None:
    for name in ("one", "other", "one"):
        Witness(box, record_named(name)).works_for([sequence(f"of {name}")])
        assert box.read().call == Call(name, [f"of {name}"])


def test_what_does_not_fit_is_left_out(box: BlackBox) -> None:
    Witness(box, record_named("toy")).works_for([sequence("x" * 64) for _ in range(5000)])
    assert requests(box) is None


def test_last_words_are_of_the_requests_that_run(box: BlackBox) -> None:
    witness = Witness(box, record_named("toy"))
    witness.works_for([sequence("a")])
    box.say("slots are scarce")
    assert box.read().words == "slots are scarce"
    witness.works_for([sequence("b")])
    assert box.read().words == ""


def test_last_words_are_not_many(box: BlackBox) -> None:
    box.say("x" * 100_000)
    assert box.read().words == "x" * 500


class Torn(mmap.mmap):
    """Its writer dies before the value is written."""

    def __setitem__(self, place: Any, value: Any) -> None:
        if b"new" in value:
            raise InterruptedError
        super().__setitem__(place, value)


def test_what_was_only_half_written_is_nothing() -> None:
    value = _Value(Torn(-1, 64), 0, 64, str)
    value.write("old")
    with pytest.raises(InterruptedError):
        value.write("new")
    assert value.read() is None


def test_a_model_is_marked_until_its_first_token(box: BlackBox) -> None:
    witness, mark = Witness(box, record_named("toy")), Mark("toy", "0" * 64, FileIdentity(1, 2, 3, 4))
    assert box.read().marks == (mark,)
    witness.loaded()
    assert box.read().marks == (Mark(mark.model, mark.digest, mark.identity, loaded=True),)
    witness.unmark()
    assert box.read().marks == ()


@pytest.mark.parametrize(("loaded", "suspects"), [(True, []), (False, ["idle"])])
def test_a_model_that_only_lies_in_memory_is_no_suspect(box: BlackBox, loaded: bool, suspects: list[str]) -> None:
    idle = Witness(box, record_named("idle"))
    if loaded:
        idle.loaded()
    Witness(box, record_named("busy")).works_for([sequence("a")])
    assert [mark.model for mark in box.read().suspects] == [*suspects, "busy"]


def test_an_engine_is_marked_until_it_has_computed(box: BlackBox, toys: dict[str, Path]) -> None:
    engines = LlamaEngines(Settings(num_thread=1), box=box)
    engine = engines(record(toys["llama"]), LoadOptions(), MemoryPlan(512, 2, 0))
    assert [mark.loaded for mark in box.read().marks] == [True]
    last(engine, ask(1, max_tokens=1))
    assert box.read().marks == ()
    until_idle(engine)
    assert box.read().call is None
    engine.close()


def test_a_load_that_fails_and_an_unload_leave_no_mark(box: BlackBox, toys: dict[str, Path], tmp_path: Path) -> None:
    engines, made = LlamaEngines(Settings(num_thread=1), box=box), record(toys["llama"])
    with pytest.raises(BadModelFile):
        engines(replace(made, path=str(tmp_path / "none")), LoadOptions(), MemoryPlan(512, 2, 0))
    assert box.read().marks == ()
    engines(made, LoadOptions(), MemoryPlan(512, 2, 0)).close()
    assert box.read().marks == ()


def test_the_words_with_which_llama_cpp_aborts_outlive_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", OTHERS_WORDS], capture_output=True, text=True)
    words = "/src/ops.cpp:7: GGML_ASSERT(n > 0) failed"
    assert (done.stdout, words in done.stderr) == (f"-6 {words}\n", True), done.stderr
