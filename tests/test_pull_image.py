"""An image in an OCI registry of Ollama's layout: Debian's docker-registry where it is installed, and a stand-in."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from rustllama.errors import BadRequest, SourceRefused
from tests.hosts import Handler, Host, hosting, listens, refuse
from tests.puller import Puller
from tests.scripted import PATIENCE_S

REGISTRY = shutil.which("docker-registry")
MODEL = b"gguf" * 50_000
TEXTS = {
    "license": b"MIT",
    "system": b"You are a pirate.",
    "params": b'{"stop":["<|end|>"],"temperature":0.5}',
    "template": b"{{ .Prompt }}",
}


def digest(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def blobs() -> dict[str, bytes]:
    return {"config": b"{}", "model": MODEL, **TEXTS}


def manifest(**more: bytes) -> bytes:
    def layer(kind: str, body: bytes) -> dict[str, object]:
        return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest(body), "size": len(body)}

    layers = [layer(kind, body) for kind, body in {"model": MODEL, **TEXTS, **more}.items()]
    media_type = "application/vnd.docker.distribution.manifest.v2+json"
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest(b"{}"), "size": 2}
    return json.dumps({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers}).encode()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """`host:port` of a real one that holds the image library/toy:latest."""
    if REGISTRY is None:
        pytest.skip("docker-registry is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {"version": "0.1", "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}}
    (tmp_path / "registry.yml").write_text(json.dumps({**config, "log": {"level": "error"}, "http": {"addr": address}}))
    command = [REGISTRY, "serve", str(tmp_path / "registry.yml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _push(f"http://{address}/v2/library/toy", process)
            yield address
        finally:
            process.kill()


def _push(url: str, process: subprocess.Popen[bytes]) -> None:
    while not listens(int(url.split("/")[2].split(":")[1])):
        assert process.poll() is None
    for body in blobs().values():
        place = requests.post(f"{url}/blobs/uploads/", timeout=PATIENCE_S).headers["Location"]
        put = requests.put(f"{place}&digest={digest(body)}", data=body, timeout=PATIENCE_S)
        assert put.status_code == 201, put.text
    kind = {"Content-Type": "application/vnd.docker.distribution.manifest.v2+json"}
    assert requests.put(f"{url}/manifests/latest", data=manifest(), headers=kind, timeout=PATIENCE_S).status_code == 201


def test_a_real_registry_gives_the_model_and_what_goes_with_it(registry: str, tmp_path: Path) -> None:
    puller = Puller(tmp_path)
    fetched = puller.pull("toy", registry=registry)
    preset = fetched.preset
    assert Path(fetched.paths[0]).read_bytes() == MODEL
    assert preset.origin == f"{registry}/library/toy:latest"
    assert (preset.license, preset.system) == ("MIT", "You are a pirate.")
    assert preset.parameters == {"stop": ["<|end|>"], "temperature": 0.5}
    assert puller.says("Go template")


@pytest.fixture
def stand_in() -> Iterator[Host]:
    with hosting() as host:
        host.files["/v2/a/b/manifests/latest"] = manifest()
        for body in blobs().values():
            host.files[f"/v2/a/b/blobs/{digest(body)}"] = body
        yield host


def image(host: Host) -> str:
    return f"{host.url.removeprefix('http://')}/a/b"


def test_a_registry_that_wants_a_token_gives_one_to_anybody(stand_in: Host, tmp_path: Path) -> None:
    stand_in.json("/token", {"token": "for-all"})

    def challenge(handler: Handler, _: bytes) -> None:
        wants = f'Bearer realm="{stand_in.url}/token",service="r",scope="repository:a/b:pull"'
        handler.answer(401, headers={"WWW-Authenticate": wants})

    stand_in.faults.append(challenge)
    Puller(tmp_path).pull(image(stand_in))
    assert "/token?service=r&scope=repository%3Aa%2Fb%3Apull" in stand_in.paths()
    assert stand_in.seen[-1][1]["Authorization"] == "Bearer for-all"


def test_a_private_image_says_so(stand_in: Host, tmp_path: Path) -> None:
    stand_in.faults.extend([refuse(401)] * 3)
    with pytest.raises(SourceRefused, match="it is private"):
        Puller(tmp_path).pull(image(stand_in))


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b'{"layers":[]}', b'{"layers":[{"digest":"sha256:../../x","size":1}]}', b'{"layers":[{}]}']
)
def test_what_is_no_image_of_a_model_is_refused(stand_in: Host, tmp_path: Path, body: bytes) -> None:
    stand_in.files["/v2/a/b/manifests/latest"] = body
    with pytest.raises(BadRequest):
        Puller(tmp_path).pull(image(stand_in))


def test_a_text_that_is_not_what_its_digest_says_is_refused(stand_in: Host, tmp_path: Path) -> None:
    stand_in.files[f"/v2/a/b/blobs/{digest(TEXTS['system'])}"] = b"You are evil."
    with pytest.raises(BadRequest, match="not what it promised"):
        Puller(tmp_path).pull(image(stand_in))
