"""The rules that keep a server safe, and a check that each has a test: switched off, its tests must fail.

usage: python -m tests.rules [WORD...]     those whose name has one of the words; prints each with the test that failed

A rule is switched off by replacing a piece of the source, in a scratch copy. That each piece is still there, once, is
looked at in every run of the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_PATIENCE_S = 120


class Rule(NamedTuple):
    """What holds, in which file of the package, and where it is tested."""

    name: str
    file: str
    on: str
    off: str
    tests: str  # of pytest


RULES = (
    # who may ask
    Rule("a host is known", "api/hosts.py", "(header and self._is_ours(header))", "header", "test_api_web.py"),
    Rule("a request names its host", "api/hosts.py", "or (header and", "or not header or (", "test_api_web.py"),
    Rule(
        "public addresses are no names",
        "api/hosts.py",
        "any(address in network for",
        "any(True for",
        "test_api_web.py",
    ),
    Rule("a page's origin is near", "api/origins.py", "not _is_near(", "False and not _is_near(", "test_api_web.py"),
    Rule(
        "origins have a web scheme",
        "api/origins.py",
        'origin.scheme not in ("http", "https")',
        "False",
        "test_api_web.py",
    ),
    Rule("'null' has to be said", "api/origins.py", "return _OPAQUE in self._words", "return True", "test_api_web.py"),
    Rule("a page of another site", "api/origins.py", "site not in _WITHOUT_ASKING", "False", "test_api_web.py"),
    Rule(
        "CORS is for known origins",
        "api/origins.py",
        "origin is not None and self._is_configured(origin)",
        "origin is not None",
        "test_api_web.py",
    ),
    Rule(
        "preflights are for known origins",
        "api/origins.py",
        "and self._is_configured(headers.get",
        "and bool(headers.get",
        "test_api_web.py",
    ),
    Rule(
        "beyond loopback a key",
        "serve.py",
        "if settings.beyond_loopback and not settings.insecure_no_auth:",
        "if False:",
        "test_serve_keys.py",
    ),
    Rule("a key that is required", "serve.py", "if settings.require_key:", "if False:", "test_serve_keys.py"),
    # keys
    Rule("a key is wanted", "api/keys.py", "if not accounts and not self._wanted:", "if True:", "test_api_keys.py"),
    Rule("a key is known", "api/keys.py", "if compare_digest(digest, given)]", "]", "test_api_keys.py"),
    Rule(
        "keys are stored hashed",
        "keys.py",
        'return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()',
        "return secret",
        "test_keys.py test_api_keys.py",
    ),
    Rule("a key's rights", "api/keys.py", "if not key.may_manage and not harmless:", "if False:", "test_api_keys.py"),
    Rule(
        "blobs are not for chat", "api/keys.py", "and rule not in _MANAGING)", ")", "test_api_keys.py test_api_blobs.py"
    ),
    Rule(
        "a key's models",
        "keys.py",
        "return not self.models or canonical_name in self.models",
        "return True",
        "test_api_keys.py",
    ),
    Rule(
        "metrics tell of all models",
        "api/keys.py",
        "if key.models and rule in _OF_ALL_MODELS:",
        "if False:",
        "test_api_keys.py",
    ),
    Rule("a key's rate", "api/keys.py", "if self.tokens < 1:", "if False:", "test_api_keys.py"),
    Rule("a key's concurrency", "api/keys.py", "self.running >= key.concurrency", "False", "test_api_keys.py"),
    Rule("a request gives its place back", "api/keys.py", "self.running -= 1", "pass", "test_api_keys.py"),
    Rule("keys go on when the database does not", "api/keys.py", "if known is None:", "if True:", "test_api_keys.py"),
    Rule("a key's name", "keys.py", "if not _NAME.fullmatch(name):", "if False:", "test_keys.py test_serve_keys.py"),
    # bodies
    Rule(
        "JSON is not deep",
        "api/decoding.py",
        "    raise _too_deep()\n\n\ndef",
        "    return\n\n\ndef",
        "test_api_fields.py test_api_guard.py",
    ),
    Rule(
        "JSON that no stack holds",
        "api/decoding.py",
        "except RecursionError:",
        "except KeyboardInterrupt:",
        "test_api_fields.py test_api_guard.py",
    ),
    Rule(
        "a body's size",
        "api/guard.py",
        'app.config["MAX_CONTENT_LENGTH"] = self._settings.max_body',
        "pass",
        "test_api_guard.py",
    ),
    Rule(
        "a chunked body's size",
        "api/guard.py",
        "request.content_length is None and len(data)",
        "False and len(data)",
        "test_api_guard.py",
    ),
    Rule(
        "a chunked body is well formed",
        "api/guard.py",
        "except ParseException as error:  #",
        "except KeyboardInterrupt as error:  #",
        "test_api_guard.py test_api_clients.py",
    ),
    Rule(
        "what a body left is read",
        "worker.py",
        "                _read_out(req.body)\n",
        "",
        "test_limits.py test_api_clients.py test_api_blobs.py",
    ),
    # time and number
    Rule(
        "a head's time",
        "client_socket.py",
        "self._enter(_Phase.HEAD, self._patience.head_s)",
        "self._enter(_Phase.HEAD, math.inf)",
        "test_client_socket.py test_limits.py",
    ),
    Rule(
        "a first head's time",
        "client_socket.py",
        "time.monotonic() + patience.head_s",
        "math.inf",
        "test_client_socket.py test_limits.py",
    ),
    Rule(
        "a body's time",
        "client_socket.py",
        "self._enter(_Phase.BODY, self._patience.body_s)",
        "self._enter(_Phase.BODY, math.inf)",
        "test_client_socket.py test_limits.py",
    ),
    Rule(
        "a large body keeps coming",
        "client_socket.py",
        "left_s = self._patience.body_s if self._unhurried",
        "left_s = math.inf if self._unhurried",
        "test_client_socket.py test_api_blobs.py",
    ),
    Rule(
        "a reader takes its answer",
        "client_socket.py",
        "_timeout(self._patience.write_s)",
        "None",
        "hazards/test_crowds.py::test_readers_that_never_read",
    ),
    Rule(
        "a reader that does not is reset",
        "client_socket.py",
        "            self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)\n",
        "",
        "hazards/test_crowds.py::test_readers_that_never_read",
    ),
    Rule(
        "a close waits for the client",
        "client_socket.py",
        "                self._linger()\n",
        "                pass\n",
        "test_client_socket.py test_limits.py",
    ),
    Rule("connections in all", "connections.py", "if self.open >= self._most:", "if False:", "test_connections.py"),
    Rule(
        "connections of one client",
        "connections.py",
        "if self.of_client[key] >= self._most_per_client:",
        "if False:",
        "test_connections.py",
    ),
    Rule(
        "connections are given back",
        "connections.py",
        "            self.open -= 1\n",
        "            pass\n",
        "test_connections.py",
    ),
    Rule(
        "a proxy's clients count alone",
        "connections.py",
        "            if peer in self._proxies:\n",
        "            if False:\n",
        "test_connections.py",
    ),
    Rule(
        "only proxies are believed",
        "addresses.py",
        "if found is None or client not in self:",
        "if found is None:",
        "test_connections.py test_api_guard.py",
    ),
    Rule("an IPv6 line is one client", "addresses.py", ">> _SUBNET_BITS << _SUBNET_BITS", "", "test_connections.py"),
    Rule(
        "refusals are one line",
        "connections.py",
        "            self._counts.clear()\n",
        "",
        "test_connections.py test_limits.py",
    ),
    # templates
    Rule(
        "a template's time",
        "template_helper.py",
        "return self._receive(timeout_s)",
        "return self._receive(600.0)",
        "test_template_helper.py",
    ),
    Rule("a template's process is ended", "template_helper.py", "    popen.kill()\n", "", "test_template_helper.py"),
    Rule(
        "a template's memory",
        "template_child.py",
        "lower(resource.RLIMIT_AS, pages * resource.getpagesize() + SPARE_BYTES)",
        "pass",
        "test_template_helper.py",
    ),
    Rule(
        "a template's text",
        "template_child.py",
        "if size_bytes > order.limit_bytes:",
        "if False:",
        "test_template_helper.py",
    ),
    Rule(
        "a template's halves of characters",
        "template_child.py",
        "except UnicodeEncodeError:",
        "except KeyboardInterrupt:",
        "test_template_helper.py",
    ),
    Rule(
        "a template without a parent",
        "template_child.py",
        "signal.setitimer(signal.ITIMER_REAL, order.deadline_s + _GRACE_S)",
        "pass",
        "test_template_helper.py",
    ),
    Rule(
        "templates that are costly rest",
        "api/renderer.py",
        "if self._clock_s() < before.rests_until_s:",
        "if False:",
        "test_api_renderer.py",
    ),
    Rule(
        "costly templates have their lane",
        "api/renderer.py",
        "brought or source.key in self._costly",
        "brought",
        "test_api_renderer.py",
    ),
    Rule(
        "templates that are brought have their lane",
        "api/renderer.py",
        "if brought or source.key",
        "if source.key",
        "test_api_renderer.py",
    ),
    Rule(
        "who waits for a template gives up",
        "api/renderer.py",
        "self._lock.acquire(timeout=self._patience_s)",
        "self._lock.acquire()",
        "test_api_renderer.py",
    ),
    # model files
    Rule(
        "a file is proved",
        "api/catalog.py",
        "prove(Path(record.path), timeout_s=self._probe_timeout_s)",
        "pass",
        "test_degraded.py test_api_models.py",
    ),
    Rule("AMX is tried", "engine/native/library.py", "not in orders.names or works()", "", "test_engine_ggml.py"),
    Rule(
        "a proof's time", "probe_child.py", "    signal.setitimer(signal.ITIMER_REAL, seconds)\n", "", "test_probe.py"
    ),
    Rule(
        "a proof's processor time",
        "probe_child.py",
        "lower(resource.RLIMIT_CPU,",
        "max(resource.RLIMIT_CPU,",
        "test_probe.py",
    ),
    Rule("a proof's memory", "probe_child.py", "lower(resource.RLIMIT_AS,", "max(resource.RLIMIT_AS,", "test_probe.py"),
    Rule("a child leaves first", "rlimits.py", '.write_text("1000")', "", "test_probe.py test_template_helper.py"),
    Rule(
        "a proof computes numbers",
        "probe_child.py",
        "if not any(map(math.isfinite, logits)):",
        "if False:",
        "test_probe.py",
    ),
    Rule(
        "a pipe hangs nobody",
        "gguf/header.py",
        "_check_regular(path, os.stat(path))\n        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK |",
        "descriptor = os.open(path, os.O_RDONLY |",
        "test_gguf.py::test_a_pipe_is_refused_without_waiting_for_a_writer",
    ),
    Rule(
        "only files are models", "gguf/header.py", "if not stat.S_ISREG(status.st_mode):", "if False:", "test_gguf.py"
    ),
    Rule(
        "a changed file is examined again",
        "api/catalog.py",
        "return record if self._is_unchanged(record) else",
        "return record if True else",
        "test_api_models.py test_degraded.py",
    ),
    Rule(
        "a file system that hangs",
        "api/catalog.py",
        "return self._files.call(str(path), timeout_s, look)",
        "return look()",
        "test_degraded.py",
    ),
    Rule(
        "a step computes numbers",
        "engine/runner.py",
        "if np.isfinite(self._context.logits(row).max()):",
        "if True:",
        "test_engine_lane.py",
    ),
    Rule(
        "a deep stack tokenizes",
        "bridge.py",
        "previous = _thread.stack_size(NATIVE_STACK_BYTES)",
        "previous = _thread.stack_size()",
        "test_bridge.py",
    ),
    # deaths
    Rule(
        "crashes count, kills do not",
        "deaths.py",
        "if -self.code in _CRASHES and not self.impatience else ()",
        "",
        "test_deaths.py",
    ),
    Rule(
        "impatience does not count",
        "deaths.py",
        "if -self.code in _CRASHES and not self.impatience else",
        "if -self.code in _CRASHES else",
        "test_deaths.py",
    ),
    Rule(
        "restarts take longer and longer",
        "deaths.py",
        "return self.clock() >= self.not_before_s",
        "return True",
        "test_deaths.py",
    ),
    Rule(
        "a server that never served gives up",
        "deaths.py",
        "return not self.served and self.failures",
        "return False and self.failures",
        "test_deaths.py",
    ),
    Rule(
        "one that has served does not",
        "deaths.py",
        "return not self.served and self.failures",
        "return self.failures",
        "test_deaths.py",
    ),
    Rule("quarantine", "verdicts.py", "if left_s > 0:", "if False:", "test_verdicts.py"),
    Rule(
        "a new proof ends quarantine",
        "verdicts.py",
        "_Verdict(record.identity, proved=True))",
        "_Verdict(record.identity, True, self._of(record.digest, record.identity).deaths))",
        "test_verdicts.py",
    ),
    Rule(
        "another file is not guilty", "verdicts.py", "and verdict.identity == identity else", "else", "test_verdicts.py"
    ),
    Rule("old deaths are forgotten", "verdicts.py", "if now_s - death.at_s < _REMEMBERED_S]", "]", "test_verdicts.py"),
    Rule(
        "only who computes is suspected",
        "engine/black_box.py",
        "call is None or call.model == mark.model or not mark.loaded",
        "True",
        "test_engine_black_box.py",
    ),
    Rule(
        "half a value is none",
        "engine/black_box.py",
        "        self._put_length(0)\n",
        "",
        "test_engine_black_box.py",
    ),
    Rule("long words are cut", "engine/black_box.py", "words[:_LONGEST_WORDS]", "words", "test_engine_black_box.py"),
    # the disk
    Rule("a damaged database is moved", "database.py", "if not self._is_sound():", "if False:", "test_database.py"),
    Rule("one process moves it", "database.py", "fcntl.flock(folder, fcntl.LOCK_EX)", "pass", "test_database.py"),
    Rule(
        "a locked database",
        "database.py",
        'if "locked" in words or "busy" in words:',
        "if False:",
        "test_database.py test_degraded.py",
    ),
    Rule(
        "a full disk",
        "database.py",
        'if "disk is full" in words or',
        "if False and",
        "test_database.py test_degraded.py",
    ),
    Rule(
        "a read-only disk",
        "database.py",
        "        if not_written:\n",
        "        if False:\n",
        "test_database.py test_degraded.py",
    ),
    Rule(
        "a log that cannot be made",
        "database.py",
        "            if not self._is_complete():\n                raise\n",
        "            raise\n",
        "test_database.py test_degraded.py",
    ),
    Rule(
        "the database is private",
        "database.py",
        "os.O_CLOEXEC, 0o600))",
        "os.O_CLOEXEC, 0o644))",
        "test_database.py test_registry.py",
    ),
    Rule(
        "the state folder is private",
        "database.py",
        "mkdir(mode=0o700,",
        "mkdir(mode=0o755,",
        "test_database.py test_registry.py",
    ),
    Rule(
        "what waits for a slow disk is bounded",
        "engine/disk_store.py",
        "min(_LEAVING_BYTES, memory.limit_bytes // _LEAVING_OF)",
        "1 << 60",
        "test_engine_disk.py",
    ),
    Rule(
        "a file is what its digest says",
        "model_files.py",
        "if came != self._path.name:",
        "if False:",
        "test_api_blobs.py",
    ),
    Rule(
        "only our files are deleted",
        "model_files.py",
        "if self.contains(path)]",
        "]",
        "test_api_fetched.py test_api_blobs.py test_api_models.py",
    ),
    Rule(
        "sources are public",
        "addresses.py",
        "return found is not None and found.is_global and not found.is_multicast",
        "return True",
        "test_api_pull.py test_pull_source.py test_pull_transfer.py",
    ),
)


def main() -> int:
    """0 where each rule has a test that fails without it."""
    words = sys.argv[1:] or [""]
    untested = 0
    for rule in RULES:
        if any(word in rule.name for word in words):
            with switched_off(rule) as folder:
                failed = first_failure(folder, rule.tests)
            untested += failed is None
            print(f"{rule.name}: {failed or 'NO TEST FAILS'}", flush=True)
    return int(untested > 0)


@contextmanager
def switched_off(rule: Rule) -> Iterator[Path]:
    """A copy of package and tests without it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("rustllama", "tests", "deploy"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, folder)
        place = folder / "rustllama" / rule.file
        place.write_text(place.read_text().replace(rule.on, rule.off))
        yield folder


def first_failure(folder: Path, tests: str) -> str | None:
    """The first of the tests that fails in that folder."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    files = [f"tests/{name}" for name in tests.split()]
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        [*command, *files], cwd=folder, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        try:
            said = running.communicate(timeout=_PATIENCE_S)[0]
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            return f"{tests} hangs"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return found[1] if found else None


if __name__ == "__main__":
    sys.exit(main())
