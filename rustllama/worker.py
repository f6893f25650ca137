"""The Gunicorn worker: gevent's, with a drain that ends every answer before the process leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import time
from http import HTTPStatus
from types import FrameType
from typing import Any

import gevent
from gevent.event import Event
from gevent.server import StreamServer
from gunicorn.http import errors
from gunicorn.workers.ggevent import GeventWorker

from rustllama import __version__, bridge, tls
from rustllama.engine.manager import EngineManager
from rustllama.errors import RustllamaError

_NOTIFY_S = 1.0  # Gunicorn's master waits for a sign of life
_POLL_S = 0.02
_LINGER_S = 0.5
_LINGER_BYTES = 1 << 20
_REFUSALS = (
    (errors.LimitRequestLine, HTTPStatus.REQUEST_URI_TOO_LONG),
    (errors.LimitRequestHeaders, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE),
    (errors.UnsupportedTransferCoding, HTTPStatus.NOT_IMPLEMENTED),
    (errors.ParseException, HTTPStatus.BAD_REQUEST),
)
_log = logging.getLogger("rustllama.serve")


class Worker(GeventWorker):  # type: ignore[misc]
    """One process of the server. SIGTERM drains, SIGQUIT ends at once, SIGINT is the master's business."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests = 0
        self._leaving = Event()
        self._serving = False

    def patch(self) -> None:
        """Makes the listeners gevent's and patches nothing; `bridge` says why."""
        self.sockets: list[Any] = [
            gevent.socket.socket(listener.FAMILY, socket.SOCK_STREAM, fileno=listener.sock.detach())
            for listener in self.sockets
        ]

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl+C reaches the whole process group

    def run(self) -> None:
        """Serves until SIGTERM, then drains and leaves."""
        self._serving = True
        gevent.spawn(self._notify_forever)
        self._preload()
        servers = [self._listen(listener) for listener in self.sockets]
        if self.age == 1:
            self._announce()
        while self.alive:
            self._leaving.wait(_NOTIFY_S)
        for server in servers:
            server.close()
        self._drain(self.app.settings.drain_timeout)
        _leave()

    def _drain(self, timeout_s: float) -> None:
        """Answers first, and then what else is on its way, like a create."""
        deadline_s = time.monotonic() + timeout_s
        self._manager.drain(timeout_s)
        deadline_s = max(deadline_s, time.monotonic() + _NOTIFY_S)  # the last pieces still have to go out
        while self._requests and time.monotonic() < deadline_s:
            gevent.sleep(_POLL_S)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        context = self.app.tls
        secured = client if context is None else tls.shake_hands(client, context)
        if secured is not None:
            super().handle(listener, secured, addr)

    def handle_request(self, *args: Any) -> None:
        self._requests += 1
        try:
            super().handle_request(*args)
        finally:
            self._requests -= 1

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """What Gunicorn could not read as HTTP gets JSON too; what the application let through is logged."""
        if isinstance(exc, ssl.SSLError):
            _log.info("a connection broke: %s", exc.reason)
            return
        status = next((code for kind, code in _REFUSALS if isinstance(exc, kind)), 500)
        if status == 500:
            _log.error("a request failed outside the application", exc_info=exc)
        else:
            _log.info("refused a request that is not HTTP: %s", type(exc).__name__)
        body = b'{"error":"the request is not valid HTTP, or its head is too long."}\n'
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        with contextlib.suppress(OSError):
            client.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            client.shutdown(socket.SHUT_WR)
            client.settimeout(_LINGER_S)
            client.recv(_LINGER_BYTES)  # or the answer is lost with what was sent and not read

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        self.alive = False
        if not self._serving:
            _leave()  # nothing is served yet
        self._manager.draining = True
        self._leaving.set()

    def handle_quit(self, _sig: int, _frame: FrameType | None) -> None:
        _leave()

    @property
    def _manager(self) -> EngineManager:
        manager: EngineManager = self.wsgi.extensions["rustllama"]
        return manager

    def _listen(self, listener: Any) -> StreamServer:
        listener.setblocking(1)
        server = StreamServer(
            listener, handle=lambda client, addr: self.handle(listener, client, addr), spawn=self._pool()
        )
        server.start()
        return server

    def _pool(self) -> gevent.pool.Pool:
        return gevent.pool.Pool(self.worker_connections)

    def _notify_forever(self) -> None:
        while True:
            self.notify()
            gevent.sleep(_NOTIFY_S)

    def _preload(self) -> None:
        """`--load`: the models are ready before the first request is accepted."""
        for name in self.app.settings.load:
            try:
                self._manager.acquire(bridge.offload(self.app.registry.get, name)).release()
            except RustllamaError as error:
                _log.error("--load %s: %s", name, error)

    def _announce(self) -> None:
        count = len(bridge.offload(self.app.registry.list))
        models = "1 model" if count == 1 else f"{count} models"
        print(f"rustllama {__version__} is ready at {self.app.url} with {models} registered.")
        print("Try: rustllama run", flush=True)


def _leave() -> None:
    """Without Python's and llama.cpp's destructors: native threads may be in the middle of a step."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
