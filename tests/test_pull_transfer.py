"""A file on its way: what a network, a server or a disk does meanwhile neither ends it nor spoils it."""

from __future__ import annotations

import hashlib
import random
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rustllama.errors import BadRequest, DiskFull, InternalError, NotFound, RustllamaError, SourceRefused, Unreachable
from rustllama.pull.progress import Fetched, Progress
from tests.conftest import Certificate
from tests.disks import Disk
from tests.hosts import Handler, Host, cut, hang, hosting, refuse
from tests.puller import BLOCK, Puller

BODY = random.Random(1).randbytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def host() -> Iterator[Host]:
    with hosting() as host:
        host.files["/model.gguf"] = BODY
        yield host


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path)


def is_whole(fetched: Fetched) -> bool:
    (path,) = map(Path, fetched.paths)
    return path.name == f"sha256-{DIGEST}" and path.read_bytes() == BODY


def test_a_file_is_fetched_in_parallel_checked_and_named_by_its_digest(host: Host, puller: Puller) -> None:
    fetched = puller.pull(f"{host.url}/model.gguf?token=secret")
    assert is_whole(fetched)
    assert fetched.preset.origin == f"{host.url}/model.gguf"
    assert host.sent_bytes == len(BODY) + 1
    assert puller.left() == []
    assert puller.told[-1] == Progress("writing manifest")
    assert Progress("pulling model.gguf", "", len(BODY), len(BODY)) in puller.told


def test_a_host_without_ranges_is_read_in_one_piece(host: Host, puller: Puller) -> None:
    host.ranges = False
    assert is_whole(puller.pull(f"{host.url}/model.gguf"))
    assert host.sent_bytes <= 2 * len(BODY)  # the look has the whole file too


@pytest.mark.parametrize("fault", [cut(10_000), cut(0), refuse(500), refuse(502), refuse(503), refuse(429)])
def test_what_breaks_is_tried_again_where_it_stopped(host: Host, puller: Puller, fault: object) -> None:
    host.faults.extend([fault] * 3)  # type: ignore[list-item]
    assert is_whole(puller.pull(f"{host.url}/model.gguf"))
    assert host.sent_bytes <= len(BODY) + 1 + 3 * len(b"no")
    assert puller.says("trying again")


def test_a_host_that_asks_for_time_gets_it(host: Host, puller: Puller) -> None:
    host.faults.append(refuse(429, Retry_After="1"))
    assert is_whole(puller.pull(f"{host.url}/model.gguf"))
    assert puller.says("trying again in 1 s: 127.0.0.1")


def test_a_host_that_asks_for_an_hour_is_told_of_at_once(host: Host, puller: Puller) -> None:
    host.faults.append(refuse(503, Retry_After="3600"))
    with pytest.raises(Unreachable) as failed:
        puller.pull(f"{host.url}/model.gguf")
    assert failed.value.retry_after_s == 3600


def test_a_stalled_connection_is_cut_and_the_file_comes(host: Host, tmp_path: Path) -> None:
    released = threading.Event()
    host.faults.append(hang(released))
    puller = Puller(tmp_path, stall_s=0.3)
    assert is_whole(puller.pull(f"{host.url}/model.gguf"))
    assert puller.says("sends nothing any more")
    released.set()


def test_a_pull_that_failed_goes_on_where_it_stopped(host: Host, puller: Puller) -> None:
    host.faults.extend([cut(50_000)] + [cut(0)] * 30)
    with pytest.raises(Unreachable, match="what is here stays"):
        puller.pull(f"{host.url}/model.gguf")
    host.faults.clear()
    host.sent_bytes = 0
    assert is_whole(puller.pull(f"{host.url}/model.gguf"))
    assert host.sent_bytes <= len(BODY) - 40_000


def test_a_file_that_has_changed_between_two_pulls_starts_over(host: Host, puller: Puller) -> None:
    host.files["/model.gguf"] = bytes(len(BODY))
    host.faults.extend([cut(50_000)] + [cut(0)] * 30)
    with pytest.raises(Unreachable):
        puller.pull(f"{host.url}/model.gguf")
    host.faults.clear()
    host.files["/model.gguf"] = BODY
    assert is_whole(puller.pull(f"{host.url}/model.gguf"))
    assert puller.says("has changed since it was begun: starting over")


def test_a_file_that_changes_meanwhile_starts_over(host: Host, puller: Puller) -> None:
    host.files["/model.gguf"] = bytes(len(BODY))

    def change(handler: object, _: bytes) -> None:
        host.files["/model.gguf"] = BODY
        refuse(503)(handler, b"")  # type: ignore[arg-type]

    host.faults.append(change)
    assert is_whole(puller.pull(f"{host.url}/model.gguf"))
    assert puller.says("has changed meanwhile: starting over")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, SourceRefused), (403, SourceRefused), (404, NotFound), (410, NotFound), (418, BadRequest)],
)
def test_a_refusal_is_told_at_once(host: Host, puller: Puller, status: int, kind: type[RustllamaError]) -> None:
    host.faults.extend([refuse(status)] * 20)
    with pytest.raises(kind, match=r"127\.0\.0\.1:\d+ "):
        puller.pull(f"{host.url}/model.gguf")


@pytest.mark.parametrize("length", ["-1", "0", "1e9", str(1 << 60), "9" * 30])
def test_a_size_that_cannot_be_is_refused(host: Host, puller: Puller, length: str) -> None:
    host.ranges = False
    host.headers["Content-Length"] = length
    with pytest.raises((BadRequest, Unreachable)):
        puller.pull(f"{host.url}/model.gguf")
    assert puller.left() == []


def test_a_file_shorter_than_its_length_ends_as_broken(host: Host, puller: Puller) -> None:
    host.ranges = False
    host.headers["Content-Length"] = str(len(BODY) + 10)
    host.headers["Connection"] = "close"
    with pytest.raises(Unreachable, match="broke"):
        puller.pull(f"{host.url}/model.gguf")


def test_all_parts_of_a_split_model_come_with_their_names(host: Host, puller: Puller) -> None:
    for number in (1, 2, 3):
        host.files[f"/m-0000{number}-of-00003.gguf"] = bytes([number]) * 100_000
    parts = [Path(path) for path in puller.pull(f"{host.url}/m-00001-of-00003.gguf").paths]
    assert [path.read_bytes()[0] for path in parts] == [1, 2, 3]
    assert [path.name[-20:] for path in parts] == [f"-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def test_a_disk_that_is_too_small_is_told_before_anything_comes(host: Host, tmp_path: Path, disk: Disk) -> None:
    puller = Puller(disk.path)
    with pytest.raises(DiskFull, match=r"free and 0\.3 MB are still to come: free .* RUSTLLAMA_MODELS"):
        puller.pull(f"{host.url}/model.gguf")
    assert host.sent_bytes == 1


def test_a_disk_that_fills_up_meanwhile_is_told_and_what_came_stays(
    host: Host, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rustllama.pull.store._SPARE_BYTES", 0)  # more than the disk has

    def fill(handler: Handler, body: bytes) -> None:
        disk.fill()
        cut(BLOCK)(handler, body)

    host.faults.append(fill)
    puller = Puller(disk.path)
    with pytest.raises(DiskFull, match="pull again, which goes on where it stopped"):
        puller.pull(f"{host.url}/model.gguf")
    disk.clear()
    assert is_whole(puller.pull(f"{host.url}/model.gguf"))


def test_no_host_is_one_sentence(puller: Puller) -> None:
    with pytest.raises(Unreachable, match="cannot be reached: see whether this machine is on the network"):
        puller.pull("http://127.0.0.1:1/model.gguf")


def test_a_host_that_does_not_prove_who_it_is_gives_nothing(
    certificate: Certificate, puller: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate.cert, certificate.key)
    with hosting(tls=tls) as host:
        host.files["/model.gguf"] = BODY
        with pytest.raises(BadRequest, match=r"does not prove who it is \(self-signed certificate\): take another"):
            puller.pull(f"{host.url}/model.gguf")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.cert))
        assert is_whole(puller.pull(f"{host.url}/model.gguf"))


def test_a_redirect_is_followed(host: Host, puller: Puller) -> None:
    host.redirects["/short.gguf"] = "/model.gguf"
    assert is_whole(puller.pull(f"{host.url}/short.gguf"))


def test_a_redirect_to_what_is_not_safe_is_refused(host: Host, puller: Puller) -> None:
    host.ranges = False
    host.faults.append(refuse(302, Location="http://example.com/model.gguf"))
    with pytest.raises(BadRequest, match="redirects to what is not https"):
        puller.pull(f"{host.url}/model.gguf")


def test_a_server_for_others_fetches_nothing_from_its_own_machine(host: Host, tmp_path: Path) -> None:
    for name in ("127.0.0.1", "localhost"):
        port = urlsplit(host.url).port
        with pytest.raises(SourceRefused, match="private network"):
            Puller(tmp_path, public_only=True).pull(f"http://{name}:{port}/model.gguf")
    assert host.seen == []


def test_a_folder_that_cannot_be_made_is_told(host: Host, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(InternalError, match="RUSTLLAMA_MODELS"):
        Puller(tmp_path).pull(f"{host.url}/model.gguf")
