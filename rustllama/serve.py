"""`rustllama serve`: checks the set-up, binds the address, and runs the application under Gunicorn."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import select
import socket
import sys
from contextlib import suppress

import flask
from gevent.ssl import SSLContext
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.sock import TCP6Socket, TCPSocket

from rustllama import tls
from rustllama.api import create_app
from rustllama.deaths import Death, Restarts
from rustllama.engine.black_box import BlackBox
from rustllama.errors import RustllamaError, SettingError
from rustllama.registry import Registry
from rustllama.settings import Settings
from rustllama.verdicts import Verdicts
from rustllama.worker import Worker

_BACKLOG = 2048
_log = logging.getLogger("rustllama.serve")


def main(settings: Settings) -> None:
    """Serves until a signal; exits with 0. Raises SettingError before anything is started."""
    registry = Registry(settings.database_path)
    for name in settings.load:
        try:
            registry.get(name)
        except RustllamaError as error:
            raise SettingError(f"RUSTLLAMA_LOAD: {error}") from None
    _check_keys(settings, registry)
    registry.close()  # a connection must not cross the fork of a worker
    context = tls.server_context(settings)
    listeners = _bind(settings)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    application = _Application(settings, registry, listeners, context)
    _Master(application).run()


class _Application(BaseApplication):  # type: ignore[misc]
    """Hands settings and sockets to Gunicorn, and the certificate as it was at the start."""

    def __init__(
        self, settings: Settings, registry: Registry, listeners: list[socket.socket], context: SSLContext | None
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.listeners = listeners
        self.tls = context
        self.black_box: BlackBox | None = None  # a worker's own, in the worker
        self.announcer = 1  # the worker, by its age, that tells that it serves
        self.url = _url(settings, listeners[0].getsockname()[1])
        super().__init__()

    def load_config(self) -> None:
        config = importlib.import_module("rustllama.gunicorn_conf")
        for name in self.cfg.settings:
            if hasattr(config, name):
                self.cfg.set(name, getattr(config, name))

    def load(self) -> flask.Flask:
        return create_app(self.settings, registry=self.registry, black_box=self.black_box)


class _Master(Arbiter):  # type: ignore[misc]
    """Gunicorn's master, with Ctrl+C as a graceful stop; a second one while it stops ends at once.

    It tells what its workers died of, and against which models that counts.
    """

    def __init__(self, application: _Application) -> None:
        super().__init__(application)
        self._stop_on_eof = application.settings.stop_on_eof
        self._registry = application.registry
        self._verdicts = Verdicts(application.registry)
        self._restarts = Restarts(application.settings.workers)
        self.LISTENERS = [_adopt(listener, self) for listener in application.listeners]

    def handle_int(self) -> None:
        raise StopIteration

    def murder_workers(self) -> None:
        super().murder_workers()
        if self._stop_on_eof and _at_eof(sys.stdin.fileno()):
            raise StopIteration

    def manage_workers(self) -> None:
        if self._restarts.hopeless:
            raise HaltServer("no worker could start; the lines above say why", self.WORKER_BOOT_ERROR)
        if self._restarts.allowed:
            super().manage_workers()

    def reap_workers(self) -> None:
        """As Gunicorn does, but with all that a death leaves to be read; and none ends a server that has served."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid == self.reexec_pid:
                    self.reexec_pid: int = 0
                elif worker := self.WORKERS.pop(pid, None):  # else an orphan, where this is process 1
                    self._ended(worker, os.waitstatus_to_exitcode(status))

    def _ended(self, worker: Worker, code: int) -> None:
        worker.tmp.close()
        death = Death(worker.pid, code, worker.black_box.read(), impatience=worker.aborted)
        others_serve = any(other.black_box.read().ready for other in self.WORKERS.values())
        self._restarts.ended(code, ready=death.evidence.ready, others_serve=others_serve)
        if worker.age == self.app.announcer and not death.evidence.ready:
            self.app.announcer = self.worker_age + 1
        if code:
            _log.error("%s", death)
        try:
            for mark in death.guilty:
                if self._verdicts.blame(mark.digest, mark.identity, death.cause):
                    _log.error('model "%s" is in quarantine now', mark.model)
        except RustllamaError as error:
            _log.error("a death could not be counted: %s", error)
        finally:
            self._registry.close()  # a connection must not cross the fork of a worker


def _adopt(listener: socket.socket, master: Arbiter) -> TCPSocket:
    kind = TCP6Socket if listener.family == socket.AF_INET6 else TCPSocket
    address = listener.getsockname()
    return kind(address, master.cfg, master.log, fd=listener.detach())


def _url(settings: Settings, port: int) -> str:
    scheme, host = "https" if settings.tls_cert else "http", settings.host[0]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _check_keys(settings: Settings, registry: Registry) -> None:
    """Raises SettingError where other machines would get in without an API key, or nobody could get in."""
    if settings.console_key or registry.api_keys():
        return
    if settings.require_key:
        raise SettingError(
            "RUSTLLAMA_REQUIRE_KEY is set and there is no API key: make one with `rustllama key add NAME`."
        )
    if settings.beyond_loopback and not settings.insecure_no_auth:
        raise SettingError(
            f"RUSTLLAMA_HOST={settings.host[0]} is open to other machines and there is no API key: make one with "
            "`rustllama key add NAME`, or let everybody in with --insecure-no-auth (RUSTLLAMA_INSECURE_NO_AUTH=1)."
        )


def _at_eof(fd: int) -> bool:
    readable, _, _ = select.select([fd], [], [], 0)
    return bool(readable) and not os.read(fd, 4096)


def _bind(settings: Settings) -> list[socket.socket]:
    """Listening sockets; the first one's address is the one that is told. Raises SettingError."""
    host, port = settings.host
    listeners: list[socket.socket] = []
    for address in settings.listen_hosts:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listener = socket.create_server((address, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if listeners and error.errno != errno.EADDRINUSE:
                continue  # no IPv6 here: the first address serves
            raise SettingError(_bind_failure(host, port, error)) from None
        port = listener.getsockname()[1]
        listeners.append(listener)
    return listeners


def _bind_failure(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: end that program or take another with --port or RUSTLLAMA_HOST."
    return (
        f"RUSTLLAMA_HOST: cannot listen at {host}, port {port}: {error.strerror}; choose another with --host or --port."
    )
