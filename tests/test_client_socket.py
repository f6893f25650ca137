"""How long a client may rest."""

from __future__ import annotations

import socket
import threading

from rustllama.client_socket import ClientSocket, Patience


def test_a_connection_that_rests_too_long_after_an_answer_has_ended() -> None:
    ours, theirs = socket.socketpair()
    client = ClientSocket(ours, Patience(head_s=60, body_s=60, write_s=60, idle_s=0.01))
    theirs.sendall(b"a request")
    assert client.recv(100) == b"a request"
    client.expect_request()
    late = threading.Timer(5, theirs.sendall, [b"the next one"])
    late.start()
    assert client.recv(100) == b""
    late.cancel()
    late.join()
    theirs.close()
    ours.close()
