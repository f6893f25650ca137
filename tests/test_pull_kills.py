"""A pull that is killed again and again, against Debian's nginx: the file is right, and hardly a byte comes twice."""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
import sys
from pathlib import Path

import msgspec

from rustllama.pull.messages import Message, Order
from tests.hazards import WHOLE, times
from tests.nginx import needs_nginx
from tests.nginx_files import nginx
from tests.relay import Relay, relaying

SIZE = times(300_000_000, 12_000_000)
KILLS = times(200, 6)
HEADERS_BYTES = 2000  # of the answers to a pull that is killed
BYTES_PER_S = 20_000_000  # the faster, the more is between nginx and the process when that dies
LONGEST_S = 2 * 0.9 * SIZE / KILLS / BYTES_PER_S  # of a pull's life once bytes come


def pulled_until(url: str, relay: Relay, folder: Path, life_s: float | None) -> Message | None:
    """The last word of a pull's process, which is killed after so long; None where it was killed before that."""
    order = msgspec.json.encode(Order(url, str(folder))) + b"\n"
    command = [sys.executable, "-m", "rustllama.pull_child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(order)
        process.stdin.flush()
        for line in process.stdout:
            message = msgspec.json.decode(line, type=Message)
            if message.progress is None:
                return message
            if message.progress.total and life_s is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(life_s)
                with relay.still():
                    process.kill()
                    process.wait()
                return None
    return None


@needs_nginx
def test_a_pull_that_is_killed_at_random_ends_with_the_right_file_and_fetches_next_to_nothing_twice(
    tmp_path: Path,
) -> None:
    pieces = random.Random(7)
    body = b"".join(pieces.randbytes(1_000_000) for _ in range(SIZE // 1_000_000))
    (tmp_path / "model.gguf").write_bytes(body)
    chance = random.Random(8)
    kills = 0
    with nginx(tmp_path) as port, relaying(port, BYTES_PER_S) as (url, relay):
        for _ in range(KILLS):
            kills += pulled_until(f"{url}/model.gguf", relay, tmp_path / "models", chance.uniform(0, LONGEST_S)) is None
        last = pulled_until(f"{url}/model.gguf", relay, tmp_path / "models", None)
    assert last is not None
    assert last.fetched is not None, last.failure
    (path,) = map(Path, last.fetched.paths)
    assert path.name == f"sha256-{hashlib.sha256(body).hexdigest()}"
    assert path.read_bytes() == body
    twice_bytes = relay.passed_bytes - SIZE - KILLS * HEADERS_BYTES
    print(f"{kills} kills, {twice_bytes / SIZE:.2%} fetched twice")
    assert kills >= 0.8 * KILLS
    assert not WHOLE or twice_bytes <= 0.02 * SIZE
