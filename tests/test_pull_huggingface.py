"""A repository of Hugging Face: what is taken of it, what is told, and who gets the token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rustllama.errors import BadRequest, NotFound, SourceRefused
from tests.hosts import Host, hosting, refuse
from tests.hub import COMMIT, publish
from tests.puller import Puller

MIDDLE, LARGE, SIGHT = b"q4" * 100_000, b"q8" * 120_000, b"eye" * 1000
FILES = {
    "README.md": b"# Toy",
    "Toy-Q4_K_M.gguf": MIDDLE,
    "Toy-Q8_0-00001-of-00002.gguf": LARGE[:150_000],
    "Toy-Q8_0-00002-of-00002.gguf": LARGE[150_000:],
    "mmproj-Toy-F16.gguf": SIGHT,
}
REPO = "hf.co/user/Toy-GGUF"


@pytest.fixture
def hub() -> Iterator[Host]:
    with hosting() as host:
        publish(host, "user/Toy-GGUF", FILES)
        yield host


@pytest.fixture
def puller(hub: Host, tmp_path: Path) -> Puller:
    return Puller(tmp_path, environ={"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"})


def test_the_usual_quantization_is_taken_and_said(puller: Puller) -> None:
    fetched = puller.pull(REPO)
    assert Path(fetched.paths[0]).read_bytes() == MIDDLE
    assert (fetched.preset.origin, fetched.preset.license) == (f"{REPO}:Q4_K_M", "apache-2.0")
    assert puller.says("Q4_K_M is taken")
    assert puller.says("the model can see")


def test_a_named_quantization_comes_with_all_its_parts(puller: Puller) -> None:
    paths = puller.pull(f"{REPO}:q8_0").paths
    assert b"".join(Path(path).read_bytes() for path in paths) == LARGE


@pytest.mark.parametrize("quantization", ["Q3_K_M", ""])
def test_one_that_is_not_there_lists_those_that_are(puller: Puller, quantization: str) -> None:
    with pytest.raises(BadRequest, match=r"has Q4_K_M \(0\.0 GB\), Q8_0 \(0\.0 GB\)"):
        puller.pull(f"{REPO}:{quantization}")


def test_the_address_of_a_file_is_that_file(puller: Puller) -> None:
    fetched = puller.pull("https://huggingface.co/user/Toy-GGUF/blob/main/Toy-Q4_K_M.gguf")
    assert Path(fetched.paths[0]).name == f"sha256-{hashlib.sha256(MIDDLE).hexdigest()}"


def test_what_is_here_already_is_not_fetched_again(hub: Host, puller: Puller) -> None:
    puller.pull(REPO)
    hub.seen.clear()
    puller.pull(REPO)
    assert not [path for path in hub.paths() if "/resolve/" in path]


def test_what_was_put_under_a_digest_and_is_something_else_is_not_taken(hub: Host, puller: Puller) -> None:
    hub.files[f"/user/Toy-GGUF/resolve/{COMMIT}/Toy-Q4_K_M.gguf"] = b"xx" * 100_000
    with pytest.raises(BadRequest, match="is not what was promised"):
        puller.pull(REPO)
    assert puller.left() == []
    assert list(puller.store.blobs.iterdir()) == []


def test_the_token_goes_to_hugging_face_alone(hub: Host, puller: Puller) -> None:
    with hosting("127.0.0.2") as storage:
        path = f"/user/Toy-GGUF/resolve/{COMMIT}/Toy-Q4_K_M.gguf"
        storage.files["/blob"] = hub.files.pop(path)
        hub.redirects[path] = f"{storage.url}/blob"
        puller.pull(REPO)
    assert hub.authorizations() == {"Bearer hf_secret"}
    assert storage.seen
    assert storage.authorizations() == {None}


def test_a_gated_repository_says_where_to_ask(hub: Host, tmp_path: Path) -> None:
    hub.faults.append(refuse(401))
    with pytest.raises(SourceRefused, match=r"huggingface\.co/user/Toy-GGUF exists.*HF_TOKEN"):
        Puller(tmp_path, environ={"HF_ENDPOINT": hub.url}).pull(REPO)


def test_a_repository_without_models_says_so(hub: Host, puller: Puller) -> None:
    publish(hub, "user/empty", {"README.md": b""})
    with pytest.raises(BadRequest, match="has no GGUF file"):
        puller.pull("hf.co/user/empty")
    with pytest.raises(NotFound):
        puller.pull("hf.co/user/none")


def test_what_is_no_listing_is_refused(hub: Host, puller: Puller) -> None:
    hub.files[f"/api/models/user/Toy-GGUF/tree/{COMMIT}"] = b"<html>"
    with pytest.raises(BadRequest, match="is it the right place"):
        puller.pull(REPO)


def test_a_busy_hub_is_asked_again(hub: Host, puller: Puller) -> None:
    hub.faults.extend([refuse(429, Retry_After="0"), refuse(500)])
    assert puller.pull(REPO).preset.license == "apache-2.0"
