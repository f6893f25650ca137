"""A pull from Debian's nginx: ranges, none, slow, a changed file, other hosts, refusals."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from rustllama.errors import NotFound, RustllamaError, SourceRefused, Unreachable
from tests.nginx import needs_nginx
from tests.nginx_files import nginx
from tests.puller import Puller

BODY = random.Random(3).randbytes(8_000_000)  # many blocks
LOCATIONS = """
location /slow/ { alias FOLDER/files/; limit_rate 2m; }
location /whole/ { alias FOLDER/files/; max_ranges 0; }
location /away/ { rewrite ^/away/(.*)$ http://localhost:$server_port/files/$1 redirect; }
location /round/ { rewrite ^ http://127.0.0.1:$server_port/round/m.gguf redirect; }
location /401/ { return 401; }
location /403/ { return 403; }
location /404/ { return 404; }
location /429/ { add_header Retry-After 400 always; return 429; }
location /500/ { return 500; }
"""

pytestmark = needs_nginx


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "files").mkdir()
    with nginx(folder, LOCATIONS.replace("FOLDER", str(folder))) as port:
        yield f"http://127.0.0.1:{port}", folder / "files" / "m.gguf"


@pytest.fixture
def url(site: tuple[str, Path]) -> str:
    site[1].write_bytes(BODY)
    return site[0]


@pytest.mark.parametrize("place", ["files", "slow", "whole", "away"])
def test_a_file_comes_whole(url: str, tmp_path: Path, place: str) -> None:
    fetched = Puller(tmp_path).pull(f"{url}/{place}/m.gguf")
    assert Path(fetched.paths[0]).name == f"sha256-{hashlib.sha256(BODY).hexdigest()}"
    assert Path(fetched.paths[0]).read_bytes() == BODY


@pytest.mark.parametrize(
    ("place", "kind", "words"),
    [
        ("401", SourceRefused, "refuses this model"),
        ("403", SourceRefused, "refuses this model"),
        ("404", NotFound, "has nothing at /404/m.gguf"),
        ("429", Unreachable, "answers 429"),
        ("500", Unreachable, "answers 500"),
        ("round", RustllamaError, "redirects without end"),
    ],
)
def test_a_refusal_is_a_sentence(url: str, tmp_path: Path, place: str, kind: type[RustllamaError], words: str) -> None:
    with pytest.raises(kind, match=words):
        Puller(tmp_path).pull(f"{url}/{place}/m.gguf")


def test_a_file_that_changes_while_it_comes_starts_over(url: str, site: tuple[str, Path], tmp_path: Path) -> None:
    puller = Puller(tmp_path)
    changed = BODY[::-1]

    def change() -> None:
        other = site[1].with_suffix(".new")
        other.write_bytes(changed)
        os.utime(other, (1, 1))
        other.replace(site[1])

    puller.once_begun = change
    fetched = puller.pull(f"{url}/files/m.gguf")
    assert Path(fetched.paths[0]).read_bytes() == changed
    assert puller.says("has changed")
