"""Gunicorn's configuration, the only one: `rustllama serve` runs with it, and so do the deployments."""

from __future__ import annotations

import os

from rustllama.settings import Settings

_settings = Settings.from_env(os.environ)
_GRACE_S = 5  # between the end of the drain, which ends every answer, and Gunicorn's kill

bind = [f"[{host}]:{_settings.host[1]}" for host in _settings.listen_hosts]  # the brackets are for IPv6
certfile, keyfile = (str(path) if path else None for path in (_settings.tls_cert, _settings.tls_key))
workers = _settings.workers
worker_class = "rustllama.worker.Worker"
timeout = 120  # seconds without a sign of life from the hub; native work does not count, it runs beside the hub
graceful_timeout = int(_settings.drain_timeout) + _GRACE_S
keepalive = 75  # seconds, longer than a proxy's idle connections live
forwarded_allow_ips = ",".join(map(str, _settings.proxies))
forwarder_headers = ""  # a proxy may say who asks and how, and nothing else
secure_scheme_headers = {"X-FORWARDED-PROTO": "https"}
control_socket_disable = True  # or Gunicorn makes a folder in HOME
loglevel = "warning"
proc_name = "rustllama"
raw_env = ["GGML_NO_BACKTRACE=1"]  # a crash is told by its signal; a backtrace under ctypes only hangs
