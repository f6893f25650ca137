"""The child process of `template_helper`: compiles and renders chat templates, within limits of its own.

usage: python -m rustllama.template_child, with a socket as standard input; it ends when that is closed.
"""

from __future__ import annotations

import resource
import signal
import socket
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from rustllama.core import Span
from rustllama.errors import TemplateRefused
from rustllama.rlimits import leave_first, lower
from rustllama.template_helper import Channel, Order, Reply
from rustllama.templates import ChatTemplate

SPARE_BYTES = 1 << 30  # of addresses, beside what the interpreter takes

_GRACE_S = 1.0  # the parent ends what takes too long; where there is none any more, the kernel's alarm does
_KEPT_TEMPLATES = 16
_LONGEST_REFUSAL = 1000  # characters


def main() -> None:
    """Answers each Order with a Reply. The first Reply only says that orders are taken."""
    limit()
    rendering = Rendering()
    with socket.socket(fileno=0) as connection, suppress(EOFError, ConnectionError):
        channel = Channel(connection)
        channel.send(Reply())
        while True:
            order = channel.receive(Order)
            signal.setitimer(signal.ITIMER_REAL, order.deadline_s + _GRACE_S)
            channel.send(rendering.answer(order))
            signal.setitimer(signal.ITIMER_REAL, 0)


def limit() -> None:
    """From here on memory runs out at a bound, which a template gets as a MemoryError."""
    lower(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        lower(resource.RLIMIT_AS, pages * resource.getpagesize() + SPARE_BYTES)
    leave_first()


class Rendering:
    """Keeps the templates that were used last, compiled."""

    def __init__(self) -> None:
        self._templates: OrderedDict[bytes, ChatTemplate] = OrderedDict()

    def answer(self, order: Order) -> Reply:
        if order.key not in self._templates and order.source is None:
            return Reply(wants_source=True)
        try:
            template = self._template(order)
            return Reply(tuple(_prompt(template, order, index) for index in range(len(order.conversations))))
        except TemplateRefused as error:
            words = str(error)[:_LONGEST_REFUSAL].encode(errors="replace").decode()
            return Reply(refusal=words)
        except MemoryError:
            return Reply(refusal="The chat template needs too much memory for these messages: send fewer.")

    def _template(self, order: Order) -> ChatTemplate:
        template = self._templates.get(order.key)
        if template is None:
            assert order.source is not None
            template = self._templates[order.key] = ChatTemplate.compiled(order.source)
        self._templates.move_to_end(order.key)
        if len(self._templates) > _KEPT_TEMPLATES:
            self._templates.popitem(last=False)
        return template


def _prompt(template: ChatTemplate, order: Order, index: int) -> tuple[Span, ...]:
    spans = template.render(order.conversations[index])
    try:
        size_bytes = sum(len(span.text.encode()) for span in spans)
    except UnicodeEncodeError:
        raise TemplateRefused("The chat template writes half a character (a lone surrogate): correct it.") from None
    if size_bytes > order.limit_bytes:
        raise TemplateRefused(
            f"The chat template writes {size_bytes} bytes for these messages, more than the context can hold: "
            "ask for a larger 'num_ctx', or use another template."
        )
    return spans


if __name__ == "__main__":
    main()
