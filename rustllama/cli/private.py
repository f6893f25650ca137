"""The private server: started where none runs, and gone with the console that started it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import IO, TYPE_CHECKING

import rustllama
from rustllama.cli.format import spinner
from rustllama.cli.home import Home
from rustllama.client import Client
from rustllama.errors import RustllamaError, ServerUnreachable
from rustllama.keys import new_secret

if TYPE_CHECKING:
    from rich.console import Console

_URL = re.compile(rb"https?://\S+")
_LOG = "private-server.log"
_GOODBYE_S = 5.0
_ENDED = "it belonged to this command and has ended, so leave and start again"
_NOTHING: Mapping[str, str] = MappingProxyType({})


@contextlib.contextmanager
def private_server(home: Home, defaults: Mapping[str, str] = _NOTHING) -> Iterator[Client]:
    """The client of a server on a free loopback port, which wants an API key that this client has.

    It ends when its standard input closes, whatever ends the console. It leads a session of its own, so neither Ctrl+C
    nor a closed terminal reaches it. `defaults` are settings that the environment may overrule. Raises RustllamaError
    with the last line of its log where it does not start.
    """
    secret = new_secret()
    process = _started(home, secret, defaults)
    assert process.stdin is not None
    try:
        url = _url(process)
        if url is None:
            raise _failure(process, home)
        yield Client(url, api_key=secret, advice=_ENDED)
    finally:
        process.stdin.close()
        process.terminate()  # it would notice the end of its input too, but later
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GOODBYE_S)


@contextlib.contextmanager
def served(home: Home, notes: Console) -> Iterator[Client]:
    """A client of the server that runs, else of a private one."""
    client = Client.from_env(os.environ)
    if _answers(client):
        yield client
        return
    with contextlib.ExitStack() as stack:
        with spinner(notes, "Starting a server"):
            private = stack.enter_context(private_server(home))
        from rustllama.cli.render import note

        note(notes, f"No server at {client.url}: a private one was started, which ends with this command.")
        yield private


def _answers(client: Client) -> bool:
    try:
        client.version()
    except ServerUnreachable:
        if client.is_local:
            return False
        raise
    return True


def _started(home: Home, secret: str, defaults: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environ = {
        "RUSTLLAMA_HOME": str(home.path),
        "RUSTLLAMA_HOST": "127.0.0.1:0",
        "RUSTLLAMA_WORKERS": "1",
        "RUSTLLAMA_STOP_ON_EOF": "1",
        "RUSTLLAMA_CONSOLE_KEY": secret,
        "RUSTLLAMA_TLS_CERT": "",
        "RUSTLLAMA_TLS_KEY": "",
    }
    try:
        home.file(_LOG).write_bytes(b"")
    except OSError as error:
        raise RustllamaError(f"RUSTLLAMA_HOME={home.path} cannot be written: {error.strerror}.") from None
    with home.file(_LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rustllama", "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=Path(rustllama.__file__).parent.parent,  # `-m` would import from the user's folder first
            env={**defaults, **os.environ, **environ},
            start_new_session=True,
        )


def _url(process: subprocess.Popen[bytes]) -> str | None:
    """Of the first line that holds one; a thread reads on, so that the pipe never fills."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := _URL.search(line):
            Thread(target=_read_on, args=(process.stdout,), daemon=True).start()
            return match.group().decode()
    process.stdout.close()
    return None


def _read_on(stdout: IO[bytes]) -> None:
    with stdout:
        for _ in stdout:
            pass


def _failure(process: subprocess.Popen[bytes], home: Home) -> RustllamaError:
    process.wait()
    lines = home.file(_LOG).read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {process.returncode}")
    return RustllamaError(f"The private server did not start: {last.removeprefix('Error: ')}")
