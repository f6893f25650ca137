"""The console on a pseudo-terminal, against a server that a test scripts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stand_in import BREAK, HANG, StandIn, last_line, line, model, stand_in, status_line
from tests.terminal import Terminal, terminal

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PROMPT = "\n>>>"
WAIT_S = 20.0


@pytest.fixture
def fake() -> Iterator[StandIn]:
    with stand_in() as found:
        yield found


@pytest.fixture
def chat(fake: StandIn, tmp_path: Path) -> Iterator[Terminal]:
    with terminal("run", RUSTLLAMA_HOST=fake.url, RUSTLLAMA_HOME=str(tmp_path)) as found:
        found.wait_for(PROMPT)
        yield found


def said(fake: StandIn) -> list[list[tuple[str, str]]]:
    """The messages of each question."""
    bodies = [body for body in fake.bodies("POST /api/chat") if body["messages"]]
    return [[(message["role"], message["content"]) for message in body["messages"]] for body in bodies]


def ask(chat: Terminal, text: str, until: str = PROMPT) -> str:
    chat.type(text)
    chat.wait_for(text.splitlines()[-1])
    chat.type("\r")
    return chat.wait_for(until)


def test_demo_says_at_the_start_what_it_is(fake: StandIn, tmp_path: Path) -> None:
    with terminal("run", RUSTLLAMA_HOST=fake.url, RUSTLLAMA_HOME=str(tmp_path)) as chat:
        assert "FILE.gguf" in chat.wait_for(PROMPT)


def test_a_conversation_goes_on_from_what_was_said(fake: StandIn, chat: Terminal) -> None:
    assert "Hello there." in ask(chat, "first")
    ask(chat, "second")
    assert said(fake)[1] == [("user", "first"), ("assistant", "Hello there."), ("user", "second")]


def test_ctrl_d_leaves(chat: Terminal) -> None:
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0


@pytest.mark.parametrize("command", ["/bye", "/exit", "/quit"])
def test_a_command_leaves(chat: Terminal, command: str) -> None:
    chat.type(f"{command}\r")
    assert chat.wait_for_end() == 0


def test_ctrl_c_at_the_prompt_drops_the_line_and_says_how_to_leave(fake: StandIn, chat: Terminal) -> None:
    chat.type("dropped")
    chat.wait_for("dropped")
    chat.type(CTRL_C)
    assert "Ctrl+D" in chat.wait_for(PROMPT)
    ask(chat, "kept")
    assert said(fake) == [[("user", "kept")]]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(fake: StandIn, chat: Terminal) -> None:
    fake.says(line("Once upon"), HANG)
    ask(chat, "a story", until="Once upon")
    chat.type(CTRL_C)
    chat.wait_for(PROMPT)
    assert fake.hung_up.wait(WAIT_S)
    fake.says(last_line())
    ask(chat, "go on")
    assert said(fake)[1][:2] == [("user", "a story"), ("assistant", "Once upon")]


def test_ctrl_c_before_the_first_word_forgets_the_question(fake: StandIn, chat: Terminal) -> None:
    fake.says(HANG)
    chat.type("unanswered\r")
    chat.wait_until(lambda: said(fake))
    chat.type(CTRL_C)
    chat.wait_for(PROMPT)
    fake.says(last_line())
    ask(chat, "next")
    assert said(fake)[1] == [("user", "next")]


def test_a_long_prompt_is_told_until_ctrl_c_and_leaves_no_trace(fake: StandIn, chat: Terminal) -> None:
    fake.says(status_line("prompt", completed=1200, total=3000, cached=800), HANG)
    ask(chat, "a long prompt", until="reading the prompt: 1,200 of 3,000 tokens (800 remembered)")
    begin = len(chat.raw)
    chat.type(CTRL_C)
    chat.wait_for(PROMPT)
    assert fake.hung_up.wait(WAIT_S)
    assert b"\x1b[1A\x1b[2K" in chat.raw[begin:], "the line is erased"
    fake.says(line("Fine."), last_line())
    assert "reading" not in ask(chat, "next")


def test_a_load_is_told_in_the_same_place(fake: StandIn, chat: Terminal) -> None:
    fake.answers["POST /api/chat"] = lambda _: [status_line("loading", completed=45, total=100), HANG]
    ask(chat, "/load other", until="loading demo 45 %")
    chat.type(CTRL_C)
    chat.wait_for(PROMPT)


@pytest.mark.parametrize("end", [(BREAK,), ()], ids=["broken", "without its last line"])
def test_an_answer_that_is_lost_is_told_and_can_be_asked_for_again(
    fake: StandIn, chat: Terminal, end: tuple[bytes, ...]
) -> None:
    ask(chat, "first")
    fake.says(line("Hel"), *end)
    assert "broke before the answer" in ask(chat, "hello")
    fake.says(line("Fine."), last_line())
    chat.type(UP)
    chat.wait_for("hello")
    chat.type("\r")
    assert "Fine." in chat.wait_for(PROMPT)
    assert said(fake)[2] == [("user", "first"), ("assistant", "Hello there."), ("user", "hello")]


def test_escape_codes_of_a_model_do_nothing(fake: StandIn, chat: Terminal) -> None:
    fake.says(line("a\x1b]0;title\x07b\x1b[2Jc [/bold]"), last_line())
    assert "a]0;titleb[2Jc [/bold]" in ask(chat, "hello")
    assert b"\x1b[2J" not in chat.raw


def test_warnings_follow_the_answer(fake: StandIn, chat: Terminal) -> None:
    fake.says(line("Hi."), last_line(warnings=["the oldest turns were dropped"]))
    assert "Warning: the oldest turns were dropped" in ask(chat, "hello")


def test_rates_are_shown_when_asked_for(chat: Terminal) -> None:
    assert "tokens/s" not in ask(chat, "hello")
    ask(chat, "/set verbose")
    assert "tokens/s" in ask(chat, "hello")
    ask(chat, "/set quiet")
    assert "tokens/s" not in ask(chat, "hello")


def test_triple_quotes_hold_several_lines(fake: StandIn, chat: Terminal) -> None:
    chat.type('"""one\r')
    chat.wait_for("...")
    chat.type('two"""\r')
    chat.wait_for(PROMPT)
    assert said(fake) == [[("user", "one\ntwo")]]


def test_pasted_lines_are_one_question(fake: StandIn, chat: Terminal) -> None:
    chat.type("\x1b[200~one\rtwo\x1b[201~")
    chat.wait_for("two")
    chat.type("\r")
    chat.wait_for(PROMPT)
    assert said(fake) == [[("user", "one\ntwo")]]


def test_a_system_message_leads_the_conversation(fake: StandIn, chat: Terminal) -> None:
    ask(chat, "/set system Be brief.")
    assert "Be brief." in ask(chat, "/show system")
    ask(chat, "hello")
    ask(chat, "/set system")
    ask(chat, "hello")
    assert said(fake)[0] == [("system", "Be brief."), ("user", "hello")]
    assert said(fake)[1][0] == ("user", "hello")


def test_parameters_are_sent_as_what_they_are(fake: StandIn, chat: Terminal) -> None:
    ask(chat, "/set parameter temperature 0.5")
    ask(chat, '/set parameter stop "a b" c')
    ask(chat, "/set parameter seed 7")
    ask(chat, "/set parameter seed")
    assert '"a b"' in ask(chat, "/show parameters")
    ask(chat, "hello")
    assert fake.bodies("POST /api/chat")[-1]["options"] == {"temperature": 0.5, "stop": ["a b", "c"]}


def test_a_parameter_that_the_server_refuses_is_not_kept(fake: StandIn, chat: Terminal) -> None:
    fake.answers["POST /api/chat"] = (400, b'{"error":"\'temperature\' must be a number from 0 to 2."}')
    assert "must be a number" in ask(chat, "/set parameter temperature hot")
    assert "defaults" in ask(chat, "/show parameters")


@pytest.mark.parametrize(("name", "hint"), [("temprature", "did you mean temperature?"), ("colour", "there are")])
def test_a_parameter_that_nobody_knows_is_not_kept(fake: StandIn, chat: Terminal, name: str, hint: str) -> None:
    assert hint in ask(chat, f"/set parameter {name} 1")
    assert "defaults" in ask(chat, "/show parameters")


def test_clear_forgets_the_conversation(fake: StandIn, chat: Terminal) -> None:
    ask(chat, "first")
    ask(chat, "/clear")
    ask(chat, "second")
    assert said(fake)[1] == [("user", "second")]


def test_load_goes_on_with_another_model(fake: StandIn, chat: Terminal, tmp_path: Path) -> None:
    assert "This is other now." in ask(chat, "/load other")
    ask(chat, "hello")
    assert fake.bodies("POST /api/chat")[-1]["model"] == "other"
    assert (tmp_path / "last-model").read_text() == "other"


def test_a_model_that_cannot_be_loaded_leaves_the_chat_where_it_was(fake: StandIn, chat: Terminal) -> None:
    fake.answers["POST /api/chat"] = (404, b'{"error":"model \'nope\' not found"}')
    assert "model 'nope' not found" in ask(chat, "/load nope")
    fake.says(line("Still here."), last_line())
    assert "Still here." in ask(chat, "hello")
    assert fake.bodies("POST /api/chat")[-1]["model"] == "demo"


def test_a_name_that_looks_like_markup_is_a_name(fake: StandIn, chat: Terminal) -> None:
    assert "This is [/red] now." in ask(chat, "/load [/red]")


def test_show_tells_of_the_model_and_the_conversation(fake: StandIn, chat: Terminal) -> None:
    fake.answers["POST /api/show"] = b'{"details":{"family":"llama"},"model_info":{},"template":"{{ messages }}"}'
    assert "llama" in ask(chat, "/show")
    assert "{{ messages }}" in ask(chat, "/show template")
    ask(chat, "first")
    assert "assistant: Hello there." in ask(chat, "/show messages")


def test_help_lists_the_commands(chat: Terminal) -> None:
    shown = ask(chat, "/?")
    assert "/set parameter NAME VALUE" in shown
    assert "/bye" in shown


@pytest.mark.parametrize(("typed", "meant"), [("/shwo", "/show"), ("/set sytem x", "/set system"), ("/x", "/help")])
def test_an_unknown_command_gets_the_nearest(chat: Terminal, typed: str, meant: str) -> None:
    assert f"did you mean {meant}?" in ask(chat, typed)


def test_a_question_may_begin_with_a_path(fake: StandIn, chat: Terminal) -> None:
    ask(chat, "/etc/hosts is what?")
    assert said(fake) == [[("user", "/etc/hosts is what?")]]


def test_tab_completes_commands(chat: Terminal) -> None:
    chat.type("/he\t")
    chat.wait_for("/help")
    chat.type("\r")
    assert "/clear" in chat.wait_for(PROMPT)


def test_history_lasts_across_sessions(fake: StandIn, chat: Terminal, tmp_path: Path) -> None:
    ask(chat, "remember me")
    ask(chat, "/set nohistory")
    ask(chat, "but not me")
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600
    assert "but not me" not in (tmp_path / "history").read_text()
    with terminal("run", RUSTLLAMA_HOST=fake.url, RUSTLLAMA_HOME=str(tmp_path)) as second:
        second.wait_for(PROMPT)
        second.type(UP)
        second.wait_for("/set nohistory")
        second.type(UP)
        second.wait_for("remember me")


def test_a_prompt_on_a_terminal_is_answered_once_as_markdown(fake: StandIn, tmp_path: Path) -> None:
    fake.says(line("**Hel"), line("lo**"), last_line())
    with terminal("run", "demo", "hi", RUSTLLAMA_HOST=fake.url, RUSTLLAMA_HOME=str(tmp_path)) as found:
        assert found.wait_for_end() == 0
        assert b"\x1b[1mHello" in found.raw


def test_no_color_is_honoured(fake: StandIn, tmp_path: Path) -> None:
    fake.says(line("# T\n\n`code` [a](http://b.c)\n\n```py\nx = 1\n```"), last_line())
    with terminal("run", "demo", "hi", RUSTLLAMA_HOST=fake.url, RUSTLLAMA_HOME=str(tmp_path), NO_COLOR="1") as found:
        assert found.wait_for_end() == 0
        assert b"\x1b[3" not in found.raw.replace(b"\x1b[3m", b"")  # 3 alone is italic


def test_ctrl_c_ends_a_verb_quietly(fake: StandIn, tmp_path: Path) -> None:
    fake.says(line("Once upon"), HANG)
    with terminal("run", "demo", "hi", RUSTLLAMA_HOST=fake.url, RUSTLLAMA_HOME=str(tmp_path)) as found:
        found.wait_for("Once upon")
        found.type(CTRL_C)
        assert found.wait_for_end() == 130
        assert "Traceback" not in found.text


def test_a_closed_terminal_ends_the_console(fake: StandIn, tmp_path: Path) -> None:
    with terminal("run", RUSTLLAMA_HOST=fake.url, RUSTLLAMA_HOME=str(tmp_path)) as chat:
        chat.wait_for(PROMPT)
    assert chat.process.returncode in (0, -signal.SIGHUP)


def test_an_unknown_model_is_exit_1_before_any_prompt(fake: StandIn, tmp_path: Path) -> None:
    fake.answers["POST /api/chat"] = (404, b'{"error":"model \'x\' not found; there is demo"}')
    fake.models(model("demo"))
    with terminal("run", "x", RUSTLLAMA_HOST=fake.url, RUSTLLAMA_HOME=str(tmp_path)) as found:
        assert found.wait_for_end() == 1
        assert "Error: model 'x' not found; there is demo" in found.text
