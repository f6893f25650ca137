"""Between greenlets and native threads."""

from __future__ import annotations

import _thread
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path

import gevent
import pytest

from rustllama import bridge
from rustllama.errors import BadRequest, Cancelled, TooSlow


def test_the_hub_goes_on_while_a_thread_works() -> None:
    working = gevent.spawn(bridge.offload, time.sleep, 0.05)
    turns = 0
    while not working.ready():
        gevent.sleep(0.001)
        turns += 1
    assert turns > 5


def test_an_error_of_a_thread_is_raised_at_the_caller_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise BadRequest("no")

    with pytest.raises(BadRequest, match="no"):
        bridge.offload(fail)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="pthread_getattr_np is Linux's")
def test_native_threads_have_room_for_a_deep_recursion() -> None:
    def stack_bytes() -> int:
        pthread = ctypes.CDLL(None)
        pthread.pthread_self.restype = ctypes.c_ulong
        attributes, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
        assert pthread.pthread_getattr_np(ctypes.c_ulong(pthread.pthread_self()), attributes) == 0
        assert pthread.pthread_attr_getstacksize(attributes, ctypes.byref(size)) == 0
        return size.value

    before = _thread.stack_size()
    threads = bridge.NativeThreads(1)
    assert threads.call(stack_bytes) >= 512 * 1024**2
    assert _thread.stack_size() == before
    threads.close()


def test_all_threads_of_a_pool_have_that_room_from_the_start() -> None:
    before = len(list(Path("/proc/self/task").iterdir()))
    threads = bridge.NativeThreads(5)
    assert len(list(Path("/proc/self/task").iterdir())) == before + 5
    threads.close()


def test_what_nobody_waits_for_leaves_the_cores_to_others() -> None:
    assert bridge.background(os.getpriority, os.PRIO_PROCESS, 0) == bridge.BACKGROUND_NICE
    assert bridge.offload(os.getpriority, os.PRIO_PROCESS, 0) == os.getpriority(os.PRIO_PROCESS, 0)


def test_the_worker_leaves_locks_as_they_are() -> None:
    """A lock that gevent has replaced wakes nobody in another thread: two imports at once would wait for ever."""
    program = """
from gevent import monkey
from rustllama.worker import Worker

worker = object.__new__(Worker)
worker.sockets = []
worker.patch()
print(monkey.saved)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{}\n", "")


def test_what_may_hang_runs_in_a_thread_and_returns_or_raises() -> None:
    def fail() -> None:
        raise BadRequest("no")

    bulkhead = bridge.Bulkhead()
    assert bulkhead.call("key", 60, threading.get_ident) != threading.get_ident()
    with pytest.raises(BadRequest, match="no"):
        bulkhead.call("key", 60, fail)


def test_who_waits_for_what_hangs_gives_up_and_takes_no_more_threads() -> None:
    go, begun = threading.Event(), list[int]()

    def hang() -> int:
        begun.append(1)
        go.wait()
        return 7

    bulkhead = bridge.Bulkhead()
    callers = [gevent.spawn(bulkhead.call, "a", 0.01, hang) for _ in range(5)]
    for caller in callers:
        with pytest.raises(TimeoutError):
            caller.get()
    assert len(begun) == 1
    with pytest.raises(TimeoutError):
        bulkhead.call("a", 60, hang)  # at once
    assert bulkhead.call("b", 60, lambda: "goes on") == "goes on"
    go.set()
    with gevent.Timeout(5):
        while not _answers(bulkhead, "a"):
            gevent.sleep(0.001)


def _answers(bulkhead: bridge.Bulkhead, key: str) -> bool:
    try:
        return bulkhead.call(key, 60, lambda: True)
    except TimeoutError:
        return False


def test_many_calls_of_one_key_take_turns() -> None:
    bulkhead = bridge.Bulkhead()
    callers = [gevent.spawn(bulkhead.call, "a", 60, partial(str, number)) for number in range(50)]
    assert [caller.get() for caller in callers] == [str(number) for number in range(50)]


def test_one_thread_serializes_and_knows_who_waits() -> None:
    threads, order = bridge.NativeThreads(1), list[str]()

    def work(name: str) -> None:
        order.append(f"{name} begins")
        time.sleep(0.01)
        order.append(f"{name} ends, {threads.contended}")

    gevent.joinall([gevent.spawn(threads.call, work, name) for name in "ab"])
    assert order == ["a begins", "a ends, True", "b begins", "b ends, False"]
    threads.close()


def test_a_relay_delivers_in_order_from_a_thread() -> None:
    seen: list[int] = []
    relay = bridge.Relay(seen.append)
    bridge.offload(lambda: deque(map(relay.post, range(100))))
    relay.close()
    assert seen == list(range(100))


def test_a_mailbox_raises_what_it_was_given() -> None:
    box: bridge.Mailbox[int] = bridge.Mailbox()
    box.put(1)
    box.put(BadRequest("no"))
    assert box.get() == 1
    with pytest.raises(BadRequest):
        box.get()


def test_a_mailbox_tells_whether_something_is_there_and_keeps_it() -> None:
    box: bridge.Mailbox[int] = bridge.Mailbox()
    assert not box.wait(0.001)
    waiting = gevent.spawn(box.wait, 60)
    gevent.sleep(0)
    box.put(1)
    assert waiting.get()
    assert box.get() == 1


def test_a_mailbox_that_nobody_empties_keeps_no_more_than_a_word_about_it() -> None:
    box: bridge.Mailbox[int] = bridge.Mailbox()
    for number in range(bridge.MOST_UNREAD + 10):
        box.put(number)
    with pytest.raises(TooSlow):
        box.get()
    assert not box.wait(0.001)


def test_what_is_sampled_is_told_when_it_has_changed_and_once_at_the_end() -> None:
    over, seen = iter([False, False, False, False, True]), iter([None, 1, 1, 2, 3])
    assert list(bridge.sampled(lambda _: next(over), lambda: next(seen))) == [1, 2, 3]


def test_shielded_work_outlives_its_caller() -> None:
    done: list[bool] = []

    def work() -> None:
        gevent.sleep(0.01)
        done.append(True)

    caller = gevent.spawn(bridge.shielded, work)
    gevent.sleep(0)
    caller.kill()
    gevent.sleep(0.05)
    assert done == [True]


@pytest.mark.parametrize("pause_s", [0, 0.02])
def test_a_client_that_says_goodbye_before_it_hangs_up_is_gone_too(pause_s: float) -> None:
    """As TLS does: what it sent hides the end from who only looks for that."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with bridge.watch_client({"gunicorn.socket": ours}):
            gevent.sleep(60)

    request = gevent.spawn(serve)
    gevent.sleep(0)
    theirs.sendall(b"goodbye")
    gevent.sleep(pause_s)
    theirs.close()
    with pytest.raises(Cancelled):
        request.get()
    ours.close()


@pytest.mark.parametrize(("sent", "gone"), [(b"", True), (b"GET / HTTP/1.1", False)])
def test_a_client_that_hangs_up_interrupts_its_request_and_one_that_sends_ahead_does_not(
    sent: bytes, gone: bool
) -> None:
    ours, theirs = socket.socketpair()

    def serve() -> str:
        try:
            with bridge.watch_client({"gunicorn.socket": ours}):
                gevent.sleep(0.1)
        except Cancelled:
            return "cancelled"
        return "served"

    request = gevent.spawn(serve)
    gevent.sleep(0)
    theirs.sendall(sent)
    if not sent:
        theirs.close()
    assert request.get() == ("cancelled" if gone else "served")
    ours.close()
    theirs.close()


def test_a_closed_timer_never_fires() -> None:
    fired: list[int] = []
    bridge.Timer(0.001, lambda: fired.append(1)).close()
    bridge.Timer(0.001, lambda: fired.append(2))
    gevent.sleep(0.02)
    assert fired == [2]
