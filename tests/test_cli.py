"""The command line: verbs, exit statuses, one line for each error, and a start that is light."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rustllama.cli import verbs
from rustllama.cli.home import Home
from rustllama.cli.pick import free_name
from rustllama.replies import Model
from tests.stand_in import BREAK, StandIn, last_line, line, model, stand_in

HEAVY = {"flask", "gevent", "peewee", "llama_cpp", "prompt_toolkit"}


@pytest.fixture
def fake() -> Iterator[StandIn]:
    with stand_in() as found:
        yield found


def rustllama(
    fake: StandIn | None, home: Path, *arguments: str, stdin: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without a terminal."""
    host = {"RUSTLLAMA_HOST": fake.url} if fake else {}
    return subprocess.run(
        [sys.executable, "-m", "rustllama", *arguments],
        env={**os.environ, "RUSTLLAMA_HOME": str(home), **host, **environ},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def in_process(fake: StandIn, *arguments: str) -> Result:
    return CliRunner().invoke(verbs, arguments, env={"RUSTLLAMA_HOST": fake.url})


def test_list_is_light(fake: StandIn, tmp_path: Path) -> None:
    program = "import sys, rustllama.cli as cli\ntry: cli.main()\nexcept SystemExit: print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program, "list"],
        env={**os.environ, "RUSTLLAMA_HOST": fake.url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "demo" in found.stdout
    assert not HEAVY & set(found.stdout.split())


def test_list_shows_what_each_model_is(fake: StandIn) -> None:
    fake.models(model("llama3.2", modified_at="2020-10-04T14:56:49.277302595-07:00", origin="hf.co/a/b:Q8_0"))
    header, row = in_process(fake, "ls").output.splitlines()
    assert header.split() == ["NAME", "SIZE", "PARAMETERS", "QUANTIZATION", "MODIFIED", "ORIGIN"]
    assert row.split()[:5] == ["llama3.2", "1.3", "GB", "1.2B", "Q8_0"]
    assert row.split("years ago")[1].split() == ["hf.co/a/b:Q8_0"]


def test_create_sends_an_absolute_path(fake: StandIn, tmp_path: Path) -> None:
    fake.answers["POST /api/create"] = b'{"status":"success"}'
    rustllama(fake, tmp_path, "create", "a", "x.gguf")
    rustllama(fake, tmp_path, "create", "b", "~/y.gguf", HOME="/home/me")
    paths = [body["modelpath"] for body in fake.bodies("POST /api/create")]
    assert paths == [str(Path("x.gguf").absolute()), "/home/me/y.gguf"]


def test_show_tells_what_a_model_is(fake: StandIn) -> None:
    fake.answers["POST /api/show"] = (
        b'{"details":{"family":"llama"},"model_info":{"llama.context_length":2048},"template":"{{ x }}",'
        b'"license":"MIT\\nand so on","path":"/models/a.gguf"}'
    )
    rows = dict(line.split(maxsplit=1) for line in in_process(fake, "show", "a").output.splitlines())
    assert rows["context"] == "2048 tokens"
    assert rows["license"] == "MIT"
    assert rows["path"] == "/models/a.gguf"
    assert in_process(fake, "show", "a", "--template").output == "{{ x }}\n"


def test_ps_tells_until_when_a_model_stays(fake: StandIn) -> None:
    fake.answers["GET /api/ps"] = (
        b'{"models":[{"name":"a:latest","size":5000000,"context_length":4096,"slots":2,'
        b'"expires_at":"2020-01-01T00:00:00Z"},{"name":"b"},{"name":"c","running":1},{"name":"d","queued":1}]}'
    )
    _, idle, kept, running, queued = in_process(fake, "ps").output.splitlines()
    assert idle.split()[:6] == ["a", "5.0", "MB", "4096", "2", "0"]
    assert "years ago" in idle
    assert kept.rstrip().endswith("for ever")
    assert running.rstrip().endswith("in use")
    assert queued.rstrip().endswith("in use")


def test_rm_removes_each_name(fake: StandIn) -> None:
    fake.answers["DELETE /api/delete"] = b'{"status":"success"}'
    in_process(fake, "rm", "a", "b")
    assert fake.bodies("DELETE /api/delete") == [{"name": "a"}, {"name": "b"}]


def test_an_error_is_one_line_and_exit_1(fake: StandIn, tmp_path: Path) -> None:
    fake.answers["DELETE /api/delete"] = (404, b'{"error":"model \'x\'\\nnot \\u001b[31mfound"}')
    found = rustllama(fake, tmp_path, "rm", "x")
    assert (found.returncode, found.stdout, found.stderr) == (1, "", "Error: model 'x' not [31mfound\n")


def test_without_a_server_a_verb_says_how_to_start_one(tmp_path: Path) -> None:
    found = rustllama(None, tmp_path, "list", RUSTLLAMA_HOST="127.0.0.1:9")
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "rustllama serve" in found.stderr


@pytest.mark.parametrize("arguments", [("list",), ("serve", "--num-ctx", "many"), ("serve", "--port", "99999")])
def test_a_bad_setting_is_exit_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    found = rustllama(None, tmp_path, *arguments, RUSTLLAMA_HOST="a:b" if arguments == ("list",) else "")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr


def test_serve_help_lists_every_variable() -> None:
    output = CliRunner().invoke(verbs, ["serve", "--help"]).output
    assert "RUSTLLAMA_KEEP_ALIVE, 300" in output
    assert "--memory-limit" in output


@pytest.mark.parametrize("verb", ["serve", "run", "create", "list", "ls", "show", "rm", "ps", "stop", "bench"])
def test_the_help_of_each_verb_shows_an_example(verb: str) -> None:
    output = CliRunner().invoke(verbs, [verb, "--help"]).output
    assert f"  rustllama {'list' if verb == 'ls' else verb}" in output


def test_the_version_is_told(tmp_path: Path) -> None:
    assert rustllama(None, tmp_path, "--version").stdout == "rustllama 0.1.0\n"


def test_a_prompt_is_answered_once_in_plain_text(fake: StandIn, tmp_path: Path) -> None:
    fake.says(line("**Hello**"), line(" \x1b[31mthere."), last_line())
    found = rustllama(fake, tmp_path, "run", "demo", "say", "hello")
    assert (found.returncode, found.stdout, found.stderr) == (0, "**Hello** [31mthere.\n", "")
    (body,) = fake.bodies("POST /api/chat")
    assert body["messages"] == [{"role": "user", "content": "say hello"}]


@pytest.mark.parametrize(
    ("prompt", "stdin", "question"),
    [
        ((), "from a pipe\n", "from a pipe"),
        (("Sum", "up:"), "a\nb\n", "Sum up:\n\na\nb"),
        (("-5 + 3?",), "", "-5 + 3?"),
    ],
)
def test_prompt_and_piped_input_make_one_question(
    fake: StandIn, tmp_path: Path, prompt: tuple[str, ...], stdin: str, question: str
) -> None:
    rustllama(fake, tmp_path, "run", "demo", *prompt, stdin=stdin)
    assert fake.bodies("POST /api/chat")[0]["messages"][-1]["content"] == question


def test_nothing_to_answer_is_an_error(fake: StandIn, tmp_path: Path) -> None:
    found = rustllama(fake, tmp_path, "run", "demo")
    assert (found.returncode, found.stdout) == (1, "")
    assert "nothing to answer" in found.stderr


def test_an_answer_that_breaks_off_is_exit_1_after_what_was_said(fake: StandIn, tmp_path: Path) -> None:
    fake.says(line("Hel"), BREAK)
    found = rustllama(fake, tmp_path, "run", "demo", "hello")
    assert (found.returncode, found.stdout) == (1, "Hel\n")
    assert found.stderr.count("\n") == 1


def test_warnings_and_rates_go_to_stderr(fake: StandIn, tmp_path: Path) -> None:
    fake.says(
        line("Hi"), last_line(warnings=["it was cut"], eval_count=10, eval_duration=2 * 10**9, prompt_eval_count=3)
    )
    found = rustllama(fake, tmp_path, "run", "--verbose", "demo", "hello")
    assert found.stdout == "Hi\n"
    warning, rates = found.stderr.splitlines()
    assert warning == "Warning: it was cut"
    assert "answer 10 tokens, 5.0 tokens/s" in rates


def test_a_reader_that_leaves_ends_the_answer_quietly(fake: StandIn, tmp_path: Path) -> None:
    fake.says(*[line("word " * 1000)] * 1000, last_line())
    command = f"{sys.executable} -m rustllama run demo hello | head -c 5"
    environ = {**os.environ, "RUSTLLAMA_HOST": fake.url, "RUSTLLAMA_HOME": str(tmp_path)}
    found = subprocess.run(command, shell=True, env=environ, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    assert (found.stdout, found.stderr) == (b"word ", b"")


def test_a_stranger_at_the_address_is_not_chatted_with(fake: StandIn, tmp_path: Path) -> None:
    fake.answers["GET /api/version"] = b'{"version":"0.6.4"}'
    found = rustllama(fake, tmp_path, "run", "demo", "hello")
    assert found.returncode == 1
    assert "no rustllama server" in found.stderr


def test_the_last_model_is_used_again(fake: StandIn, tmp_path: Path) -> None:
    fake.models(model("demo"), model("mine"))
    rustllama(fake, tmp_path, "run", "mine", "hello")
    rustllama(fake, tmp_path, "run", stdin="hello")
    assert [body["model"] for body in fake.bodies("POST /api/chat")] == ["mine", "mine"]


def test_demo_stands_in_for_a_last_model_that_is_gone(fake: StandIn, tmp_path: Path) -> None:
    Home(tmp_path).remember("gone")
    found = rustllama(fake, tmp_path, "run", stdin="hello")
    assert fake.bodies("POST /api/chat")[0]["model"] == "demo"
    assert found.stderr == "The model used last, gone, is gone: this is demo.\n"


def test_a_file_is_registered_under_a_name_of_its_own(fake: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "Llama 3.2.gguf"
    file.touch()
    fake.models(model("llama-3.2", "/elsewhere.gguf"))
    fake.answers["POST /api/create"] = b'{"status":"success"}'
    found = rustllama(fake, tmp_path, "run", str(file), "hello")
    assert fake.bodies("POST /api/create") == [{"name": "llama-3.2-2", "modelpath": str(file)}]
    assert "as llama-3.2-2" in found.stderr


def test_a_file_that_has_a_name_is_not_registered_again(fake: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.touch()
    fake.models(model("mine", str(file)))
    rustllama(fake, tmp_path, "run", str(file), "hello")
    assert fake.bodies("POST /api/chat")[0]["model"] == "mine"


def test_a_file_that_does_not_exist_is_named(fake: StandIn, tmp_path: Path) -> None:
    found = rustllama(fake, tmp_path, "run", "./missing.gguf", "hello")
    assert found.returncode == 1
    assert str(Path("missing.gguf").absolute()) in found.stderr


@pytest.mark.parametrize(
    ("file", "name"), [("A b(c).gguf", "a-b-c"), ("m-00001-of-00003.gguf", "m"), ("-.gguf", "model")]
)
def test_a_file_name_becomes_a_model_name(file: str, name: str) -> None:
    assert free_name(Path(file), []) == name
    assert free_name(Path(file), [Model(name.upper()), Model(f"{name}-2:latest")]) == f"{name}-3"


def test_the_consoles_files_are_its_owners_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "new" / "state")
    home.remember("mine")
    assert (home.path.stat().st_mode & 0o777, (home.path / "last-model").stat().st_mode & 0o777) == (0o700, 0o600)
    assert home.last_model() == "mine"


def test_a_state_folder_that_cannot_be_is_no_reason_not_to_answer(fake: StandIn, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert rustllama(fake, tmp_path / "file", "run", "demo", "hello").stdout == "Hello there.\n"


def test_an_option_that_there_is_not_is_no_model(fake: StandIn) -> None:
    found = in_process(fake, "run", "--verbos", "demo")
    assert found.exit_code == 2
    assert "No such option" in found.output
    assert fake.seen == []
