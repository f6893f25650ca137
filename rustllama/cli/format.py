"""Sizes, times and tables as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

_UNITS = (("year", 365 * 86_400), ("month", 30 * 86_400), ("week", 7 * 86_400), ("day", 86_400), ("hour", 3_600))
_CONTROL = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n")


def clean(text: str) -> str:
    """Without control characters but tab and newline: what others wrote must not command the terminal."""
    return text.translate(_CONTROL)


def one_line(text: object) -> str:
    return " ".join(clean(str(text)).split())


def size(size_bytes: int) -> str:
    value, units = float(size_bytes), ["B", "KB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.1f} {units[0]}" if value < 99.95 and units[0] != "B" else f"{value:.0f} {units[0]}"


def distance(time: datetime, now: datetime) -> str:
    """`2 hours ago` or `in 4 minutes`; both times with a zone."""
    seconds = abs(now - time) / timedelta(seconds=1)
    unit, length = next((row for row in (*_UNITS, ("minute", 60)) if seconds >= row[1]), ("second", 1))
    count = int(seconds // length)
    words = f"{count} {unit}{'' if count == 1 else 's'}"
    if count == 0:
        return "now"
    return f"{words} ago" if time <= now else f"in {words}"


def parse_time(text: str) -> datetime:
    """Of RFC 3339 with a fraction of any length. Raises ValueError."""
    whole = re.sub(r"\.\d+", "", text).upper().replace("Z", "+00:00")
    return datetime.fromisoformat(whole)


def since(text: str) -> str:
    """How far an RFC 3339 time is from now, or the text itself where it is none."""
    try:
        return distance(parse_time(text), datetime.now(timezone.utc))
    except (ValueError, TypeError):
        return text


def console_on(stream: TextIO) -> Console:
    """A console for a standard stream; where that is no terminal, lines are plain and as long as they need to be."""
    from rich.console import Console

    is_terminal = stream.isatty()
    return Console(file=stream, force_terminal=is_terminal, width=None if is_terminal else 10_000, highlight=False)


def spinner(console: Console, text: str) -> Status:
    """Turns while its `with` block runs, on a terminal; `text` is shown as it is."""
    from rich.text import Text

    return console.status(Text(clean(text)))


def print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns that fit the terminal; where there is none, as wide as their content."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(table)


def print_fields(console: Console, fields: Iterable[tuple[str, str]]) -> None:
    from rich.text import Text

    for name, value in fields:
        console.print(Text.assemble((f"{name:<14}", "bold"), one_line(value) or "unknown"), soft_wrap=True)
