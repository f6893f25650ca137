"""`rustllama doctor`: what is wrong is found and told, and nothing is changed or started."""

from __future__ import annotations

import json
import os
import resource
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner, Result

from rustllama import doctor
from rustllama.cli import verbs
from rustllama.doctor import address, bandwidth, capacity, hardware, library, state, variables
from rustllama.doctor.finding import Finding, Mark
from rustllama.engine import memory
from rustllama.registry import Registry, examine
from rustllama.settings import Settings
from tests.conftest import Server
from tests.test_database import spoil
from tests.toys import write_toy

GIB = 1 << 30


def marks(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.about, finding.mark.value) for finding in findings]


def bad(findings: list[Finding]) -> str:
    """The one sentence about what is not as it should be."""
    (found,) = (finding.text for finding in findings if finding.mark is not Mark.OK)
    return found


def run(home: Path, *arguments: str, **environ: str) -> Result:
    with socket.create_server(("127.0.0.1", 0)) as free:
        host = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"RUSTLLAMA_HOME": str(home), "RUSTLLAMA_HOST": host, **environ}
    return CliRunner().invoke(verbs, ["doctor", *arguments], env=variables)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A state folder with the model `toy`."""
    path = write_toy(tmp_path / "toy.gguf")
    registry = Registry(tmp_path / "home" / "rustllama.db", bundled=tmp_path / "none")
    registry.put(examine("toy", path))
    registry.close()
    return tmp_path / "home"


def look(home: Path) -> list[Finding]:
    return list(state.examine(Settings(home=home)))


def test_a_sound_machine_has_a_line_for_each_thing_and_status_0(tmp_path: Path) -> None:
    started_s = time.monotonic()
    done = run(tmp_path / "home")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert all(line.startswith(("ok", "hint")) for line in lines)
    for about in ("disk", "state folder", "address", "llama.cpp", "cores", "memory", "bandwidth", "fits"):
        assert any(about in line for line in lines), about
    assert not (tmp_path / "home").exists()
    assert time.monotonic() - started_s < 30  # it waits for nothing that may hang


def test_json_has_the_numbers_too(tmp_path: Path) -> None:
    found = json.loads(run(tmp_path / "home", "--json").output)
    facts = {finding["about"]: finding["facts"] for finding in found["findings"]}
    assert found["ok"] is True
    assert facts["cores"]["cores"] >= 1
    assert facts["bandwidth"]["bytes_per_s"] > 10**8


def test_what_is_wrong_is_status_1(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    done = run(tmp_path / "home", "--json", RUSTLLAMA_WORKERS="many", RUSTLLAMA_SLOT="3")
    assert done.exit_code == 1
    found = json.loads(done.output)
    texts = [finding["text"] for finding in found["findings"] if finding["mark"] != "ok"]
    assert found["ok"] is False
    assert any("RUSTLLAMA_WORKERS='many'" in text for text in texts)
    assert any("did you mean RUSTLLAMA_SLOTS" in text for text in texts)
    assert any("no folder" in text for text in texts)


def test_each_bad_setting_is_told_and_the_others_hold() -> None:
    settings, findings = variables.examine(
        {"RUSTLLAMA_NUM_CTX": "-1", "RUSTLLAMA_KEEP_ALIVE": "soon", "RUSTLLAMA_SLOTS": "3", "PATH": "/bin"}
    )
    assert settings.slots == 3
    assert marks(findings) == [("settings", "wrong")] * 2


def test_a_state_folder_that_others_may_write_is_wrong_and_one_they_may_read_is_not_nice(home: Path) -> None:
    home.chmod(0o777)
    assert ("state folder", "wrong") in marks(look(home))
    home.chmod(0o755)
    assert "chmod 700" in bad(look(home))
    home.chmod(0o700)
    assert {mark for _, mark in marks(look(home))} == {"ok"}


def test_a_state_folder_of_somebody_else_is_told(home: Path) -> None:
    try:
        os.chown(home, 12345, -1)
    except PermissionError:
        pytest.skip("needs to be root")
    assert "belongs to user 12345" in bad(look(home))


def test_a_state_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be made" in bad(look(tmp_path / "file" / "home"))


def test_a_damaged_database_is_told_and_left_alone(home: Path) -> None:
    spoil(home / "rustllama.db")
    before = (home / "rustllama.db").read_bytes()
    assert "is damaged" in bad(look(home))
    assert (home / "rustllama.db").read_bytes() == before
    assert not list(home.glob("*.corrupt*"))


def test_a_database_of_a_newer_rustllama_is_told(home: Path) -> None:
    with closing(sqlite3.connect(home / "rustllama.db")) as other:
        other.execute("PRAGMA user_version = 99")
    assert "newer rustllama" in bad(look(home))


def test_a_locked_database_is_told(home: Path) -> None:
    with closing(sqlite3.connect(home / "rustllama.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "is locked" in bad(look(home))
        other.rollback()
    assert ("models", "ok") in marks(look(home))


def test_a_model_whose_file_is_gone_is_wrong_and_one_that_changed_a_hint(home: Path, tmp_path: Path) -> None:
    os.utime(tmp_path / "toy.gguf", (1, 1))
    assert "examined again" in bad(look(home))
    (tmp_path / "toy.gguf").unlink()
    assert "'toy' has lost its file" in bad(look(home))
    assert ("models", "wrong") in marks(look(home))


def test_files_that_no_model_uses_are_told(home: Path) -> None:
    folder = Settings(home=home).blobs_path
    folder.mkdir(parents=True)
    (folder / f"sha256-{'0' * 64}").write_bytes(b"sent")
    (folder / f"sha256-{'1' * 64}.01.upload").write_bytes(b"on its way")
    assert "1 files in" in bad(look(home))


def answering(settings: Settings, url: str) -> Finding:
    (found,) = address.examine(settings, {"RUSTLLAMA_HOST": url})
    return found


def test_a_pull_that_nobody_went_on_with_is_told_after_a_week(home: Path) -> None:
    partial = home / "models" / "partial"
    partial.mkdir(parents=True)
    (partial / "ab.data").write_bytes(b"x" * 1000)
    assert {mark for _, mark in marks(look(home))} == {"ok"}
    os.utime(partial / "ab.data", (0, 0))
    assert f"pulls that ended early are in {partial}" in bad(look(home))


def test_a_rustllama_that_runs_is_no_fault(server: Server) -> None:
    found = answering(Settings.from_env({"RUSTLLAMA_HOST": server.url}), server.url)
    assert found.mark is Mark.OK
    assert "is healthy" in found.text


class _Other(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "0.1"}')

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def other_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Other) as other:
        thread = Thread(target=other.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{other.server_port}"
        other.shutdown()
        thread.join()


def test_a_port_that_another_program_has_is_wrong() -> None:
    with other_server() as url:
        assert "taken by another program" in answering(Settings.from_env({"RUSTLLAMA_HOST": url}), url).text
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert answering(Settings.from_env({"RUSTLLAMA_HOST": url}), url).mark is Mark.WRONG


def test_an_address_of_no_machine_of_ours_is_wrong() -> None:
    url = "http://192.0.2.1:9"
    assert answering(Settings.from_env({"RUSTLLAMA_HOST": url}), url).mark is Mark.WRONG


def test_a_library_that_dies_or_is_not_there_is_told() -> None:
    kill = "import os; os.kill(os.getpid(), 4)"
    (dead,) = library.examine((sys.executable, "-c", kill))
    assert "SIGILL" in dead.text
    (missing,) = library.examine((sys.executable, "-c", "import no_such_library"))
    assert (missing.mark, "no_such_library" in missing.text) == (Mark.WRONG, True)


def test_a_build_that_leaves_the_processor_or_a_gpu_unused_is_told() -> None:
    build = library.Library("99.0", "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 0", has_gpu=False)
    found = list(library.described(build, frozenset({"avx", "avx2", "fma"}), has_nvidia=True))
    assert marks(found) == [("llama.cpp", "ok"), ("llama.cpp", "hint"), ("llama.cpp", "hint")]
    assert "without AVX2, FMA" in found[1].text
    assert "GGML_CUDA" in found[2].text


def test_a_unit_of_the_processor_for_which_the_library_was_built_in_vain_is_told() -> None:
    build = library.Library("99.0", "CPU : AVX512 = 1 | AMX_INT8 = 1", has_gpu=False, left_amx=True)
    found = list(library.described(build, frozenset(), has_nvidia=False))
    assert "it uses AVX512." in found[0].text
    assert "AMX" in bad(found)


def test_an_old_library_is_wrong() -> None:
    build = library.Library("0.2.90", "AVX = 1", has_gpu=False)
    found = list(library.described(build, frozenset(), has_nvidia=False, oldest="0.3.36"))
    assert "older than 0.3.36" in bad(found)


def test_what_fits_is_what_the_engine_would_plan() -> None:
    settings = Settings(num_ctx=4096, memory_limit=8 * GIB)
    available = capacity.limit_bytes(settings, 100 * GIB)
    assert available == 8 * GIB - memory.prompt_cache_bytes(settings)
    found = {fit.quantization: fit for fit in capacity.fits(settings, available, 20e9)}
    assert {name: fit.model for name, fit in found.items()} == {"Q4_K_M": "8B", "Q8_0": "3B", "F16": "3B"}
    best = found["Q4_K_M"]
    assert best.plan.size_bytes <= available
    assert best.plan.n_ctx == 4096
    assert best.tokens_per_s == pytest.approx(20e9 / best.size_bytes)


def test_nothing_fits_into_nothing() -> None:
    assert list(capacity.fits(Settings(), 1000, 1e9)) == []


def test_bandwidth_is_measured_with_any_number_of_threads() -> None:
    assert all(bandwidth.measure(threads, 64 << 20, duration_s=0.01) > 10**8 for threads in (1, 3))


def test_a_low_limit_of_open_files_is_a_hint() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = list(hardware.open_files(4096, hard=1000))
    assert "744 connections" in bad(found)
    assert list(hardware.open_files(1, hard=max(hard, 1000))) == []


def test_whatever_cannot_be_looked_at_is_a_finding(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        environ = {"RUSTLLAMA_HOST": host, "RUSTLLAMA_HOME": str(tmp_path), "RUSTLLAMA_TLS_CERT": "/nowhere.pem"}
        found = [finding for finding in doctor.examine(environ) if finding.about != "llama.cpp"]  # as it was built
        assert "/nowhere.pem" in bad(found)
