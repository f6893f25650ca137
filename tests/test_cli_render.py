"""What answers look like: Markdown block by block, never commands to the terminal, plain where there is none."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta, timezone

import pytest
from rich.console import Console

from rustllama.cli.format import clean, distance, parse_time, print_table, size
from rustllama.cli.render import LiveAnswer, PlainAnswer, answer_on, split_blocks
from rustllama.cli.waiting import SHOWN_AFTER_S, Waiting, described
from rustllama.replies import Reply

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


def console(*, height: int = 24, width: int = 60, is_terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=height, force_terminal=is_terminal, color_system=None, _environ={}
    )


def shown(target: Console) -> str:
    file = target.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def kept(pieces: Iterable[str], *, height: int = 24) -> str:
    """What stays on the screen of an answer that was drawn at every piece."""
    target = console(height=height)
    with LiveAnswer(target, clock=iter(range(1_000_000)).__next__) as answer:
        for piece in pieces:
            answer.feed(piece)
    return on_screen(shown(target))


def on_screen(written: str) -> str:
    """The lines that a terminal would show, for the few controls that are used."""
    lines, row = [""], 0
    for control, text in re.findall(r"(\x1b\[[?0-9;]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", written):
        if control == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif control == "\x1b[1A":
            row -= 1
        elif control == "\x1b[2K":
            lines[row] = ""
        lines[row] += text
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def test_a_short_answer_is_rendered_once() -> None:
    assert kept(["Hello ", "**wor", "ld**, ", "1 < 2"]) == "Hello world, 1 < 2"


def test_blocks_are_parted_by_one_blank_line() -> None:
    assert kept(["# Title\n\n", "A line\nand another\n", "\n- one\n- two\n\n", "The end."]).split("\n") == [
        *("Title".center(60).rstrip(), "", "A line", "and another", "", " • one", " • two", "", "The end."),
    ]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_answer_looks_the_same_however_it_comes(size: int) -> None:
    text = (
        "1. one\n\n2. two\n   more\n\n```py\nx = 1\n\ny = 2\n```\n\n> said\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nEnd\n"
    )
    assert kept(text[at : at + size] for at in range(0, len(text), size)) == kept([text])


def test_a_code_block_longer_than_the_screen_is_complete() -> None:
    code = [f"line {number}" for number in range(40)]
    text = "\n".join(["```", *code, "```", "", "End"])
    assert kept(text, height=10).split("\n") == [*code, "", "End"]


def test_nothing_higher_than_the_screen_is_drawn_before_it_is_done() -> None:
    target = console(height=10)
    with LiveAnswer(target, clock=iter(range(1_000_000)).__next__) as answer:
        for number in range(40):
            answer.feed(f"line {number}\n")
        drawn = shown(target)
    assert max(map(len, re.findall(r"(?:\x1b\[1A\x1b\[2K)+", drawn))) == 8 * len("\x1b[1A\x1b[2K")


def test_drawing_is_rarer_than_pieces() -> None:
    target = console()
    with LiveAnswer(target, clock=lambda: 0.0) as answer:
        for _ in range(100):
            answer.feed("word ")
        assert shown(target).count("word") == 1


def test_finished_blocks_are_not_drawn_again() -> None:
    target = console()
    with LiveAnswer(target, clock=iter(range(1_000_000)).__next__) as answer:
        answer.feed("first\n\nsecond\n")
        before = shown(target).count("first")
        answer.feed("more")
        assert shown(target).count("first") == before


@pytest.mark.parametrize(
    "text",
    ["[/red] [bold]x[/bold]", "<b>List<int></b>", "<div>x</div>", "[1]: http://a.b", "Vec<u8> &T", "http://a.b/c_d_e"],
)
def test_text_that_looks_like_markup_is_shown_as_it_is(text: str) -> None:
    assert kept([text]) == text


def test_the_address_behind_a_link_is_shown() -> None:
    assert kept(["[bank](http://evil.example) ![cat](http://a.b/c.png)"]) == (
        "bank (http://evil.example) !cat (http://a.b/c.png)"
    )


def test_control_characters_never_reach_the_terminal() -> None:
    assert kept(["a\x1b", "]52;c;aGk=\x07b\x9b31m `\x1b[2J`"]) == "a]52;c;aGk=b31m [2J"


def test_an_escape_spelt_as_an_entity_is_no_escape() -> None:
    assert "\x1b" not in kept(["&#27;[31m &#x1b;]0;x&#7;"])


def test_plain_text_comes_as_it_is_and_ends_with_a_newline() -> None:
    file = io.StringIO()
    with PlainAnswer(file) as answer:
        answer.feed("**a")
        assert file.getvalue() == "**a"
        answer.feed("**\x1b[31m")
    assert file.getvalue() == "**a**[31m\n"


def test_an_answer_that_broke_off_keeps_what_was_said() -> None:
    target = console()
    with suppress(KeyboardInterrupt), LiveAnswer(target, clock=lambda: 0.0) as answer:
        answer.feed("one ")
        answer.feed("two")
        raise KeyboardInterrupt
    assert on_screen(shown(target)) == "one two"


@pytest.mark.parametrize(("is_terminal", "term"), [(False, "xterm"), (True, "dumb")])
def test_without_a_real_terminal_answers_are_plain(is_terminal: bool, term: str) -> None:
    target = Console(file=io.StringIO(), force_terminal=is_terminal, _environ={"TERM": term})
    assert isinstance(answer_on(target), PlainAnswer)


def test_blocks_are_split_where_nothing_can_join_them_any_more() -> None:
    assert split_blocks("para\n\n- a\n\n- b\n# T") == ["para\n", "- a\n\n- b", "# T"]
    assert split_blocks("```\n\n# no title") == ["```\n\n# no title"]


READING = Reply(status="prompt", completed=1200, total=3000, cached=800)
WORDS = [
    (Reply(status="loading", model="llama3.2", completed=1_350_000_000, total=3_000_000_000), "loading llama3.2 45 %"),
    (Reply(status="loading", model="\x1b[31mx"), "loading [31mx 0 %"),
    (Reply(status="queued", position=4), "waiting: 3 before you"),
    (Reply(status="queued", position=1), "waiting: you are next"),
    (READING, "reading the prompt: 1,200 of 3,000 tokens (800 remembered)"),
    (Reply(status="prompt", total=3000), "reading the prompt: 0 of 3,000 tokens"),
    (Reply(status="pondering"), ""),
]


def waiting_line(reply: Reply, *, after_s: float = SHOWN_AFTER_S, width: int = 100) -> str:
    """What is drawn that long after the beginning, without the spinner."""
    target = console(width=width)
    waiting = Waiting(target, iter((0.0, after_s)).__next__)
    waiting.tell(reply)
    target.print(waiting)
    return shown(target)[2:].rstrip("\n")


@pytest.mark.parametrize(("reply", "words"), WORDS)
def test_what_an_answer_waits_for_has_its_words(reply: Reply, words: str) -> None:
    assert described(reply) == words


def test_a_bar_shows_how_much_is_done() -> None:
    assert waiting_line(READING) == f"{described(READING)} {'━' * 8}{'─' * 12}"
    assert waiting_line(Reply(status="queued", position=4)) == "waiting: 3 before you"


@pytest.mark.parametrize("width", [4, 20, 60, 62, 63, 80])
def test_what_an_answer_waits_for_is_never_more_than_a_line(width: int) -> None:
    line = waiting_line(READING, width=width)
    assert "\n" not in line
    assert len(line) <= width - 2


def test_nothing_is_shown_of_what_is_over_soon() -> None:
    assert waiting_line(READING, after_s=SHOWN_AFTER_S - 0.01) == ""


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ConnectionError])
def test_what_an_answer_waited_for_leaves_no_trace(end: type[BaseException] | None) -> None:
    target, now_s = console(), [0.0]
    target.print("before")
    with suppress(KeyboardInterrupt, ConnectionError), LiveAnswer(target, clock=lambda: now_s[0]) as answer:
        answer.waits(READING)
        now_s[0] = 1.0
        if end:
            raise end
        answer.feed("the answer")
    assert "1,200 of 3,000" in shown(target)
    assert on_screen(shown(target)) == ("before" if end else "before\nthe answer")
    assert shown(target).count("\x1b[?25l") == shown(target).count("\x1b[?25h"), "the cursor is back"


@pytest.mark.parametrize(("is_terminal", "term"), [(False, "xterm"), (True, "dumb")])
def test_without_a_real_terminal_nobody_sees_what_an_answer_waits_for(is_terminal: bool, term: str) -> None:
    target = Console(file=io.StringIO(), force_terminal=is_terminal, _environ={"TERM": term})
    with answer_on(target) as answer, Waiting(target, iter(range(1_000_000)).__next__) as waiting:
        answer.waits(READING)
        waiting.tell(READING)
        answer.feed("the answer")
    assert shown(target) == "the answer\n"


def test_a_wide_table_is_not_cut_where_there_is_no_terminal() -> None:
    target = console(width=10_000, is_terminal=False)
    print_table(target, ("NAME", "SIZE"), [("x" * 200, "[red]")])
    assert shown(target).split() == ["NAME", "SIZE", "x" * 200, "[red]"]


def test_a_name_is_folded_and_not_shortened_on_a_narrow_terminal() -> None:
    target = console(width=20)
    print_table(target, ("NAME", "SIZE"), [("abcdefghijklmnopqrstuvwxyz", "1 GB")])
    assert "…" not in shown(target)


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 B"), (999, "999 B"), (3_400_000, "3.4 MB"), (12_300_000_000, "12.3 GB")]
)
def test_sizes_are_short(size_bytes: int, text: str) -> None:
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "now"), (-1, "1 second ago"), (-7200, "2 hours ago"), (-86400, "1 day ago"), (250, "in 4 minutes")],
)
def test_times_are_told_as_distances(seconds: int, text: str) -> None:
    assert distance(NOW + timedelta(seconds=seconds), NOW) == text


def test_a_time_may_have_nanoseconds_and_a_zone() -> None:
    assert parse_time("2026-01-01T17:00:00.277302595-07:00") == NOW
    assert parse_time("2026-01-02T00:00:00Z") == NOW


def test_cleaning_keeps_tabs_newlines_and_all_scripts() -> None:
    assert clean("a\tb\r\n漢é\x00\x7f\u0085") == "a\tb\n漢é"
