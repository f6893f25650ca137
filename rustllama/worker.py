"""The Gunicorn worker: gevent's, with a drain that ends every answer before the process leaves."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

import gevent
from gevent.event import Event
from gevent.server import StreamServer
from gunicorn.workers.ggevent import GeventWorker

from rustllama import __version__, bridge
from rustllama.engine.manager import EngineManager
from rustllama.errors import RustllamaError

_NOTIFY_S = 1.0  # Gunicorn's master waits for a sign of life
_POLL_S = 0.02
_log = logging.getLogger("rustllama.serve")


class Worker(GeventWorker):  # type: ignore[misc]
    """One process of the server. SIGTERM drains, SIGQUIT ends at once, SIGINT is the master's business."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests = 0
        self._leaving: Event | None = None

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl+C reaches the whole process group

    def run(self) -> None:
        """Serves until SIGTERM, then drains and leaves."""
        self._leaving = Event()
        gevent.spawn(self._notify_forever)
        self._preload()
        servers = [self._listen(listener) for listener in self.sockets]
        if self.age == 1:
            self._announce()
        while self.alive:
            self._leaving.wait(_NOTIFY_S)
        for server in servers:
            server.close()
        self._manager.drain(self.app.settings.drain_timeout)
        with gevent.Timeout(_NOTIFY_S, False):
            while self._requests:
                gevent.sleep(_POLL_S)
        _leave()

    def handle_request(self, *args: Any) -> None:
        self._requests += 1
        try:
            super().handle_request(*args)
        finally:
            self._requests -= 1

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        self.alive = False
        if self._leaving is None:
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
