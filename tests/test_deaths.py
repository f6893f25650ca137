"""The deaths of workers: the line in the log, the models to blame, and restarts that do not spin."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest

from rustllama.core import FileIdentity
from rustllama.deaths import Death, Restarts
from rustllama.engine.black_box import Call, Evidence, Mark

MARK = Mark("toy", "0" * 64, FileIdentity(1, 2, 3, 4))
LOADED = Mark("toy", "0" * 64, FileIdentity(1, 2, 3, 4), loaded=True)
ASSERTION = "ops.cpp:7: GGML_ASSERT(n > 0) failed"


def told(code: int, **evidence: object) -> str:
    return str(Death(12, code, Evidence(**{"ready": True, **evidence})))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (told(-6, call=Call("toy", ["a", "b"]), words=ASSERTION), f'while computing for requests a, b: {ASSERTION}'),
        (told(-11, call=Call("toy", ["a"])), 'worker 12 died of SIGSEGV in model "toy" while computing for request a'),
        (told(-11, call=Call("toy", [])), 'worker 12 died of SIGSEGV in model "toy" after its requests'),
        (told(-7, call=Call("b", ["a"]), marks=(MARK,)), 'for request a and while model "toy" was loading'),
        (told(-7, marks=(MARK,)), 'worker 12 died of SIGBUS while model "toy" was loading'),
        (told(-7, marks=(LOADED,)), 'worker 12 died of SIGBUS while model "toy" waited for its first token'),
        (told(-4, ready=False), "worker 12 died of SIGILL before it served"),
        (told(-9), "worker 12 died of SIGKILL (somebody killed it, or memory was short) while no model computed"),
        (told(-40), "worker 12 died of signal 40 while no model computed"),
        (told(3, ready=False), "worker 12 died of exit status 3 before it served"),
        (str(Death(12, -6, Evidence(ready=True), True)), "worker 12 gave no sign of life and was ended"),
    ],
)  # fmt: skip
def test_the_log_says_what_happened_to_whom(line: str, words: str) -> None:
    assert line.endswith(words)


@pytest.mark.parametrize("sign", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE])
def test_a_crash_counts_against_the_marked_model(sign: signal.Signals) -> None:
    assert Death(12, -sign, Evidence(marks=(MARK,))).guilty == (MARK,)


@pytest.mark.parametrize(("code", "impatience"), [(-signal.SIGKILL, False), (-signal.SIGABRT, True), (1, False)])
def test_impatience_and_lack_of_memory_are_not_the_models_fault(code: int, impatience: bool) -> None:
    assert Death(12, code, Evidence(marks=(MARK,)), impatience).guilty == ()


@dataclass(slots=True)
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_worker_that_served_is_replaced_at_once_however_often() -> None:
    restarts = Restarts(1, Clock())
    for _ in range(100):
        restarts.ended(-11, ready=True)
        assert restarts.allowed
        assert not restarts.hopeless


def test_a_server_that_never_served_gives_up() -> None:
    restarts = Restarts(2, Clock())
    for _ in range(7):
        restarts.ended(-4, ready=False)
        assert not restarts.hopeless
    restarts.ended(-4, ready=False)
    assert restarts.hopeless


def test_a_server_of_which_one_worker_serves_does_not_give_up() -> None:
    restarts = Restarts(2, Clock())
    for code in (3, *[-4] * 20):
        restarts.ended(code, ready=False, others_serve=True)
        assert not restarts.hopeless


def test_an_error_of_python_at_the_first_start_is_final() -> None:
    restarts = Restarts(4, Clock())
    restarts.ended(3, ready=False)
    assert restarts.hopeless


def test_a_server_that_served_tries_on_in_longer_and_longer_intervals() -> None:
    clock = Clock()
    restarts = Restarts(1, clock)
    restarts.ended(-11, ready=True)
    delays = []
    for _ in range(2000):
        restarts.ended(3, ready=False)
        delays.append(restarts.not_before_s - clock.now_s)
        assert restarts.allowed == (delays[-1] == 0)
        clock.now_s = restarts.not_before_s
        assert restarts.allowed
    assert (delays[:5], delays[-1], restarts.hopeless) == ([0, 0.5, 1, 2, 4], 32, False)


def test_a_worker_that_serves_again_ends_the_waiting() -> None:
    restarts = Restarts(1, Clock())
    for ready in (True, False, False, False, True):
        restarts.ended(-11, ready=ready)
    restarts.ended(-11, ready=False)
    assert restarts.not_before_s == 0
