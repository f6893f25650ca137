"""The process of one pull, so that it takes neither time nor memory from the answers, and can be ended at any moment.

It gets an Order on standard input, prints a Message on each line, and ends when its standard input does.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import msgspec

from rustllama.engine.neighbours import Neighbours
from rustllama.errors import BadRequest, RustllamaError
from rustllama.pull.messages import Failure, Message, Order
from rustllama.pull.pace import Pace
from rustllama.pull.progress import Progress
from rustllama.pull.pulling import Pulling
from rustllama.pull.retries import Pauses
from rustllama.pull.source import parse
from rustllama.pull.store import Store
from rustllama.pull.web import Web
from rustllama.rlimits import give_way

_NICE = 19


def main() -> None:
    """Ends without Python's destructors: a thread may wait for a server that says nothing."""
    give_way(_NICE)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _say(_pulled(order))
    os._exit(0)


def _pulled(order: Order) -> Message:
    web = Web(public_only=order.public_only)
    pauses = Pauses(rest_s=Pace(Neighbours().free).rest_s)
    try:
        source = parse(order.source, registry=order.registry)
        return Message(fetched=Pulling(Store(Path(order.folder)), web, _tell, pauses=pauses).run(source))
    except RustllamaError as error:
        field = error.field if isinstance(error, BadRequest) else None
        return Message(failure=Failure(type(error).__name__, str(error), field, error.retry_after_s))


def _tell(progress: Progress) -> None:
    _say(Message(progress=progress))


def _say(message: Message) -> None:
    """One write, as several threads may speak."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(message) + b"\n")


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
