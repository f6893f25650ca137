"""The only door to gevent: worker threads for blocking calls, greenlets, events, and the watch on a client's socket.

Everything here works in the hub of the thread that first uses it. Nothing is monkey-patched: greenlets and native
threads share locks (imports, logging, Jinja2's caches), and gevent's own wake nobody in another thread.
"""

from __future__ import annotations

import _socket
import _thread
import os
import select
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from queue import Empty
from typing import Any, Generic, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import gevent
from gevent.event import Event as Event
from gevent.lock import RLock as RLock
from gevent.lock import Semaphore
from gevent.queue import SimpleQueue
from gevent.threadpool import ThreadPool

from rustllama.errors import Cancelled, TooSlow

P = ParamSpec("P")
T = TypeVar("T")

# llama.cpp's tokenizers recurse once per character of a run; 8 MiB is not enough, and unused stack costs nothing.
NATIVE_STACK_BYTES = 512 * 1024**2
FILE_THREADS = 8
HANGING_THREADS = 32
SAMPLE_S = 0.1
MOST_UNREAD = 1 << 14  # pieces of an answer, a few megabytes
BACKGROUND_NICE = 10  # not more: a thread that hardly runs may hold the interpreter's lock


class _Outcome(Generic[T]):
    """What a call returned or raised, to be told elsewhere; gevent would print what its threads and greenlets raise."""

    def __init__(self, fn: Callable[..., T], args: Any = (), kwargs: Any = None) -> None:
        self._error: Exception | None = None
        try:
            self._value = fn(*args, **(kwargs or {}))
        except Exception as error:  # any: `get` raises it
            self._error = error

    def get(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value


class NativeThreads:
    """A bounded pool of native threads. The greenlet that calls waits, the hub does not; one thread serializes."""

    def __init__(self, threads: int = 1) -> None:
        previous = _thread.stack_size(NATIVE_STACK_BYTES)
        try:
            self._pool = ThreadPool(threads)
            self._pool.size = threads  # all threads start now, with this stack
        finally:
            _thread.stack_size(previous)
        self._waiting = 0

    @property
    def contended(self) -> bool:
        """Whether some caller waits for a thread: one that has one should come to an end."""
        return self._waiting > self._pool.maxsize

    def call(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `fn` in the thread and returns or raises what it does."""
        self._waiting += 1
        try:
            outcome: _Outcome[T] = self._pool.apply(_Outcome, (fn, args, kwargs))
            return outcome.get()
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._pool.kill()


@cache
def _file_threads() -> NativeThreads:
    return NativeThreads(FILE_THREADS)


def offload(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a blocking function (files, SQLite, templates, tokenizers, loads) in a worker thread."""
    return _file_threads().call(fn, *args, **kwargs)


class Bulkhead:
    """Worker threads for calls that may never return, such as those into a network's file system.

    Who has waited long enough gives up, and the thread stays with its call. The calls of one key take turns, so that
    they lose one thread and those of others go on. See Nygard, "Release It!".
    """

    def __init__(self) -> None:
        self._compartments: WeakValueDictionary[str, _Compartment] = WeakValueDictionary()

    def call(self, key: str, timeout_s: float, fn: Callable[[], T]) -> T:
        """Returns or raises what `fn` does. Raises TimeoutError, and does so at once while a call of this key hangs."""
        compartment = self._compartments.get(key)
        if compartment is None:
            compartment = self._compartments[key] = _Compartment()
        if compartment.hangs or not compartment.turn.acquire(timeout=timeout_s):
            raise TimeoutError
        work = gevent.spawn(compartment.run, fn)
        work.join(timeout_s)
        if not work.ready():
            compartment.hangs = True
            raise TimeoutError
        outcome = work.value
        assert outcome is not None  # it returned
        return outcome.get()


class _Compartment:
    """Lives as long as somebody calls."""

    def __init__(self) -> None:
        self.turn = Semaphore()
        self.hangs = False

    def run(self, fn: Callable[[], T]) -> _Outcome[T]:
        """In a greenlet of its own, as the thread may outlast the caller's patience."""
        try:
            outcome: _Outcome[T] = _hanging_threads().apply(_Outcome, (fn,))
            return outcome
        finally:
            self.hangs = False
            self.turn.release()


@cache
def _hanging_threads() -> ThreadPool:
    return ThreadPool(HANGING_THREADS)  # which start when they are needed


@cache
def _background_thread() -> NativeThreads:
    return NativeThreads(1)


def background(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a blocking function in the one thread for what nobody waits for, which leaves the cores to others."""

    def unhurried() -> T:
        if sys.platform == "linux":  # where this is of the thread, and not of the process
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, BACKGROUND_NICE)
        return fn(*args, **kwargs)

    return _background_thread().call(unhurried)


def spawn(fn: Callable[[], None]) -> None:
    """Runs `fn` in a greenlet of its own; it must not raise."""
    gevent.spawn(fn)


def shielded(fn: Callable[[], T]) -> T:
    """Calls `fn` in a greenlet of its own: it comes to its end also where the client of the calling one leaves."""
    outcome: _Outcome[T] = gevent.spawn(_Outcome, fn).get()
    return outcome.get()


class Timer:
    """Calls `fn` in a greenlet after a delay, unless it is closed before."""

    def __init__(self, delay_s: float, fn: Callable[[], None]) -> None:
        self._greenlet = gevent.spawn_later(delay_s, fn)

    def close(self) -> None:
        if self._greenlet is not gevent.getcurrent():
            self._greenlet.kill(block=False)


class Relay(Generic[T]):
    """Hands items from any thread to a function in the hub, in order, without waiting for it."""

    def __init__(self, deliver: Callable[[T], None]) -> None:
        self._deliver = deliver
        self._items: deque[T] = deque()
        self._wake = gevent.get_hub().loop.async_()
        self._wake.start(self._drain)

    def post(self, item: T) -> None:
        self._items.append(item)
        self._wake.send()

    def _drain(self) -> None:
        while self._items:
            self._deliver(self._items.popleft())

    def close(self) -> None:
        """Delivers what is left; called in the hub."""
        self._drain()
        self._wake.stop()
        self._wake.close()


class Mailbox(Generic[T]):
    """What one greenlet waits for and the hub fills. A put exception is raised at the reader.

    A reader that leaves too much unread gets TooSlow in the place of all of it.
    """

    def __init__(self) -> None:
        self._queue: Any = SimpleQueue()
        self._full = False

    def put(self, item: T | Exception) -> None:
        if self._full:
            return
        self._full = self._queue.qsize() >= MOST_UNREAD
        if self._full:
            self._queue = SimpleQueue()
            item = TooSlow(f"The answer was not read: {MOST_UNREAD} pieces of it waited.")
        self._queue.put(item)

    def get(self) -> T:
        item: T | Exception = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to get, within that time."""
        try:
            self._queue.peek(timeout=timeout_s)
        except Empty:
            return False
        return True


def sampled(over: Callable[[float], object], look: Callable[[], T | None]) -> Iterator[T]:
    """What `look` sees, every SAMPLE_S until `over`, which waits so long for it, and once more then.

    Only what has changed is told; None is nothing.
    """
    last = None
    while True:
        is_over = over(SAMPLE_S)
        seen = look()
        if seen is not None and seen != last:
            last = seen
            yield seen
        if is_over:
            return


@contextmanager
def watch_client(environ: Mapping[str, Any]) -> Iterator[None]:
    """While inside, a client that hangs up raises Cancelled in this greenlet at its next wait.

    Does nothing where the WSGI environment has no socket. A client that closes only its sending side counts as gone,
    as it does for Go's net/http.
    """
    client: socket.socket | None = environ.get("gunicorn.socket")
    if client is None:
        yield
        return
    watch = _Watch(client, gevent.getcurrent())
    try:
        yield
    finally:
        watch.close()


class _Watch:
    """Waits for the socket to become readable. That is its end, or what may come before: a request sent ahead, or TLS's
    goodbye, which is left alone. Then the end is looked for again and again.
    """

    def __init__(self, client: socket.socket, reader: Any) -> None:
        self._client = client
        self._reader = reader
        loop = gevent.get_hub().loop
        self._watcher = loop.io(client.fileno(), 1)
        self._again = loop.timer(SAMPLE_S, SAMPLE_S)
        self._watcher.start(self._readable)

    def _readable(self) -> None:
        self._watcher.stop()
        self._again.start(self._look)
        self._look()

    def _look(self) -> None:
        if _hung_up(self._client.fileno()):
            self._again.stop()
            self._reader.kill(Cancelled(), block=False)

    def close(self) -> None:
        for watcher in (self._watcher, self._again):
            watcher.stop()
            watcher.close()


def _hung_up(fd: int) -> bool:
    """Peeks below gevent's and TLS's wrappers. What was sent before the end hides it from recv, but not from poll."""
    ends = select.poll()
    ends.register(fd, getattr(select, "POLLRDHUP", 0))  # where there is none, an end behind data is not seen
    if ends.poll(0):
        return True
    raw = _socket.socket(fileno=fd)
    try:
        return raw.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        raw.detach()


def sleep(delay_s: float) -> None:
    """Lets other greenlets run."""
    gevent.sleep(delay_s)
