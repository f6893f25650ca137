"""The address of the server: free for one, taken by a rustllama, or by something else."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import requests

from rustllama.client import API_KEY, CA, base_url
from rustllama.doctor.finding import Finding, hint, ok, wrong
from rustllama.settings import Settings

_TIMEOUT_S = 0.7


def examine(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    host, port = settings.host
    url = base_url(environ.get("RUSTLLAMA_HOST") or "localhost")
    if settings.tls_cert is not None:
        url = url.replace("http://", "https://", 1)
    if not _answers(url):
        yield _free(settings.listen_hosts[0], port)
        return
    with requests.Session() as session:
        session.trust_env = False  # a proxy cannot reach this machine's loopback
        session.verify = environ.get(CA) or str(settings.tls_cert or "") or True
        if environ.get(API_KEY):
            session.headers["Authorization"] = f"Bearer {environ[API_KEY]}"
        try:
            yield _told(session, url)
        except requests.exceptions.SSLError:
            yield hint("address", f"what answers at {url} has a certificate that is not trusted: see {CA}.")
        except (requests.RequestException, ValueError, AttributeError, KeyError):
            yield wrong(
                "address",
                f"port {port} on {host} is taken by another program: end it, or set RUSTLLAMA_HOST to another port.",
            )


def _told(session: requests.Session, url: str) -> Finding:
    """Raises what is raised of an answer that is not a rustllama's."""
    health = session.get(f"{url}/health", timeout=_TIMEOUT_S)
    status = health.json().get("status", health.json().get("error"))
    version = session.get(f"{url}/api/version", timeout=_TIMEOUT_S).json()
    if "rustllama" not in version and "error" not in version:
        raise ValueError(version)
    name = f"rustllama {version['rustllama']}" if "rustllama" in version else f"a rustllama that wants {API_KEY}"
    if health.status_code == requests.codes.ok:
        return ok("address", f"{name} runs at {url} and is healthy.", version=version.get("rustllama"))
    return wrong("address", f"{name} at {url} is not healthy ({status}): see its log.")


def _answers(url: str) -> bool:
    place = urlsplit(url)
    try:
        socket.create_connection((place.hostname or "", place.port or 0), _TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _free(host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            return wrong("address", f"{host} is not this machine, and nothing answers there: see RUSTLLAMA_HOST.")
        return wrong("address", f"port {port} on {host} cannot be used: {error.strerror}; set RUSTLLAMA_HOST.")
    return ok("address", f"no server runs; port {port} on {host} is free.")
