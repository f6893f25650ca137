"""A slow network: a relay to a port of this machine that lets so many bytes a second through, and counts them."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

_PIECE_BYTES = 8192
_BUFFER_BYTES = 4096  # of the kernel, so that little is on its way


class Relay:
    """`passed_bytes` have gone to clients."""

    def __init__(self, listener: socket.socket, port: int, bytes_per_s: float) -> None:
        self._listener = listener
        self._port = port
        self._piece_s = _PIECE_BYTES / bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self.passed_bytes = 0

    def serve(self) -> None:
        """Until the listener is shut down."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._port)) as server:
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(_PIECE_BYTES)
                    if not data:
                        return
                    if ready is client:
                        server.sendall(data)
                    else:
                        self._pass(client, data)

    def _pass(self, client: socket.socket, data: bytes) -> None:
        with self._lock:
            now_s = time.monotonic()
            self._free_s = max(now_s, self._free_s) + self._piece_s
            due_s = self._free_s - now_s
        time.sleep(due_s)
        with self._sending:
            _check_there(client)  # what is sent to a client that is gone reaches nobody, and no error tells so
            client.sendall(data)
            self.passed_bytes += len(data)

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Inside, nothing passes: a process takes a while to die, and what it gets meanwhile it cannot keep."""
        with self._sending:
            yield


def _check_there(client: socket.socket) -> None:
    """Raises OSError where it has hung up."""
    with contextlib.suppress(BlockingIOError):
        if not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            raise ConnectionResetError


@contextlib.contextmanager
def relaying(port: int, bytes_per_s: float) -> Iterator[tuple[str, Relay]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay(listener, port, bytes_per_s)
        thread = threading.Thread(target=relay.serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", relay
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
