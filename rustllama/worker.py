"""The Gunicorn worker: gevent's, with a drain that ends every answer before the process leaves."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import os
import signal
import socket
import ssl
import sys
import time
from contextlib import AbstractContextManager
from http import HTTPStatus
from types import FrameType
from typing import Any

import gevent
from gevent.event import Event
from gevent.server import StreamServer
from gunicorn.http import errors
from gunicorn.workers.ggevent import GeventWorker

from rustllama import __version__, bridge, tls
from rustllama.addresses import Proxies
from rustllama.api.catalog import Catalog
from rustllama.api.failures import plain_failure
from rustllama.client_socket import ClientSocket, Patience
from rustllama.connections import Connections, Refusals, affordable
from rustllama.engine.black_box import BlackBox
from rustllama.engine.manager import EngineManager
from rustllama.errors import BadRequest, Busy, InternalError, RustllamaError, TooManyRequests, TooSlow

_NOTIFY_S = 1.0  # Gunicorn's master waits for a sign of life
_POLL_S = 0.02
_SEND_BUFFER_BYTES = 64 << 10  # what may wait in the kernel for a client that does not read
_DRAINED_BYTES = 64 << 10
_REFUSED_AT_ONCE = 64
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
        self.black_box = BlackBox()  # made by the master, before the fork
        self._requests = 0
        self._leaving = Event()
        self._serving = False
        self._refusing = 0
        self._refusals = Refusals()
        settings = self.app.settings
        self._patience = Patience(
            settings.head_timeout, settings.body_timeout, settings.write_timeout, self.cfg.keepalive
        )
        self._connections = Connections(
            affordable(settings.max_connections), settings.max_connections_per_client, Proxies(settings.proxies)
        )

    def patch(self) -> None:
        """Makes the listeners gevent's and patches nothing; `bridge` says why."""
        self.sockets: list[Any] = [
            gevent.socket.socket(listener.FAMILY, socket.SOCK_STREAM, fileno=listener.sock.detach())
            for listener in self.sockets
        ]

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl+C reaches the whole process group
        signal.signal(signal.SIGABRT, signal.SIG_DFL)  # the master tells by it what happened
        faulthandler.enable(all_threads=False)

    def load_wsgi(self) -> None:
        self.app.black_box = self.black_box
        super().load_wsgi()

    def run(self) -> None:
        """Serves until SIGTERM, then drains and leaves."""
        self._serving = True
        gevent.spawn(self._notify_forever)
        self._preload()
        servers = [self._listen(listener) for listener in self.sockets]
        self.black_box.ready()
        if self.age == self.app.announcer:
            self._announce()
        while self.alive:
            self._leaving.wait(_NOTIFY_S)
        for server in servers:
            server.close()
        self._drain(self.app.settings.drain_timeout)
        self._refusals.tell()
        _leave()

    def _drain(self, timeout_s: float) -> None:
        """Answers first, and then what else is on its way, like a create."""
        deadline_s = time.monotonic() + timeout_s
        if self._requests and timeout_s:
            _log.info("stopping: %d running, up to %g s to end; Ctrl+C again does not wait", self._requests, timeout_s)
        self._manager.drain(timeout_s)
        deadline_s = max(deadline_s, time.monotonic() + _NOTIFY_S)  # the last pieces still have to go out
        while self._requests and time.monotonic() < deadline_s:
            gevent.sleep(_POLL_S)

    def timeout_ctx(self) -> AbstractContextManager[None]:
        """Gunicorn's limit on a head and the idle time before it: ClientSocket has these."""
        return contextlib.nullcontext()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        context = self.app.tls
        secured = client if context is None else tls.shake_hands(client, context, self._refusals.note)
        if secured is not None:
            super().handle(listener, ClientSocket(secured, self._patience), addr)

    def handle_request(self, listener_name: Any, req: Any, sock: ClientSocket, addr: Any) -> None:
        sock.expect_body(when_late=req.force_close)
        forwarded = ",".join(value for name, value in req.headers if name == "X-FORWARDED-FOR")
        self._requests += 1
        try:
            with self._connections.asked(addr[0], forwarded) as client:
                super().handle_request(listener_name, req, sock, (client, *addr[1:]))
                _read_out(req.body)
        finally:
            self._requests -= 1
        sock.expect_request()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """What Gunicorn could not read as HTTP gets JSON too; what the application let through is logged."""
        if isinstance(exc, ssl.SSLError):
            _log.info("a connection broke: %s", exc.reason)
            return
        status, error = _told(exc)
        if status == 500:
            _log.error("a request failed outside the application", exc_info=exc)
        else:
            self._refusals.note(type(exc).__name__)
        body = plain_failure(error, getattr(req, "path", ""))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        if error.retry_after_s is not None:
            head += f"Retry-After: {error.retry_after_s}\r\n"
        with contextlib.suppress(OSError):
            client.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)

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
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # its connections inherit it
        server = StreamServer(listener, handle=functools.partial(self._serve, listener))
        server.start()
        return server

    def _serve(self, listener: Any, raw: Any, addr: Any) -> None:
        """From the first byte to the last of a connection, in a greenlet of its own."""
        try:
            with self._connections.opened(addr[0]):
                self.handle(listener, raw, addr)
        except (Busy, TooManyRequests) as error:
            self._refuse(raw, error)

    def _refuse(self, raw: Any, error: Busy | TooManyRequests) -> None:
        client = ClientSocket(raw, self._patience)
        self._refusing += 1
        try:
            if self._refusing > _REFUSED_AT_ONCE:
                client.hurry()
            if self.app.tls is None:  # else a handshake would have to come first, which costs more than all the rest
                self.handle_error(None, client, None, error)
            else:
                self._refusals.note(type(error).__name__)
            client.close()
        finally:
            self._refusing -= 1

    def _notify_forever(self) -> None:
        while True:
            self.notify()
            self._refusals.tell()
            gevent.sleep(_NOTIFY_S)

    def _preload(self) -> None:
        """`--load`: the models are ready before the first request is accepted."""
        catalog: Catalog = self.wsgi.extensions["rustllama_catalog"]
        for name in self.app.settings.load:
            try:
                self._manager.acquire(catalog.current(name)).release()
            except RustllamaError as error:
                _log.error("--load %s: %s", name, error)

    def _announce(self) -> None:
        count = len(bridge.offload(self.app.registry.list).models)
        models = "1 model" if count == 1 else f"{count} models"
        print(f"rustllama {__version__} is ready at {self.app.url} with {models} registered.")
        print("Try: rustllama run", flush=True)


def _told(exc: BaseException) -> tuple[int, RustllamaError]:
    """What a client is told of an exception that no handler saw, with its status."""
    if isinstance(exc, RustllamaError):
        return exc.status, exc
    status = next((code for kind, code in _REFUSALS if isinstance(exc, kind)), 500)
    if status == 500:
        return 500, InternalError("Something went wrong in the server: its log says more.")
    return status, BadRequest("The request is not valid HTTP, or its head is too long.")


def _read_out(body: Any) -> None:
    """Takes what a handler left of the body, or the next request on this connection would begin in it.

    Raises StopIteration, as Gunicorn does where a connection ends, if it does not come well and in time.
    """
    try:
        while body.read(_DRAINED_BYTES):
            gevent.sleep(0)
    except (TooSlow, errors.ParseException):
        raise StopIteration from None


def _leave() -> None:
    """Without Python's and llama.cpp's destructors: native threads may be in the middle of a step."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
