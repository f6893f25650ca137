"""A client that uses a server in all ways, as chance has it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.hazards.conftest import PATIENCE_S

MODELS = ("toy", "mamba")
WORDS = ("some", "words", "put", "together", "in", "many", "ways", "so", "that", "prompts", "begin", "alike")
NOT_READ = (
    b"",
    b"{",
    b"[1, 2]",
    b'"\xff"',
    b"[" * 100_000,
    b'{"model": "../toy"}',
    b'{"model": "nobody", "prompt": "hello"}',
)
NO_CHAT = (
    b'{"model": "toy", "messages": "hello"}',
    b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "toy", "messages": [{"role": "user"}], "options": {"num_ctx": -1}}',
    b'{"model": "toy", "messages": [], "options": {"temperature": "hot"}}',
)


@dataclass(slots=True)
class Visitor:
    """Sends one request after another, as chance has it; each checks its answer."""

    url: str
    name: str
    file: Path
    chance: random.Random
    session: requests.Session

    def visit(self) -> None:
        action, _ = self.chance.choices(ACTIONS, [weight for _, weight in ACTIONS])[0]
        action(self)

    def chat(self) -> None:
        streamed, dialect = self.chance.random() < 0.5, self.chance.choice(("/api/chat", "/v1/chat/completions"))
        text = self._post(dialect, {**self._asked(), "stream": streamed}).text
        assert '"error"' not in text
        if streamed:
            assert text.endswith("data: [DONE]\n\n") or '"done":true' in text, text

    def generate(self) -> None:
        body = {"model": "toy", "prompt": self._words(), "options": self._options(), "keep_alive": "5m"}
        assert self._post("/api/generate", {**body, "stream": False}).json()["done"]

    def leave(self) -> None:
        """In the middle of a stream."""
        body = {**self._asked(), "stream": True, "options": {"num_predict": 400}}
        with requests.post(f"{self.url}/api/chat", json=body, stream=True, timeout=PATIENCE_S) as response:
            assert next(response.iter_content(1))

    def look(self) -> None:
        paths = ("/api/tags", "/api/list", "/api/ps", "/api/version", "/health", "/metrics", "/v1/models", "/")
        self._get(self.chance.choice(paths))

    def show(self) -> None:
        assert self._post("/api/show", {"model": self.chance.choice(MODELS)}).json()["model_info"]

    def err(self) -> None:
        path = self.chance.choice(("/api/chat", "/api/generate", "/v1/chat/completions", "/api/show", "/api/create"))
        body = self.chance.choice((*NOT_READ, *NO_CHAT) if path == "/api/chat" else NOT_READ)
        response = self.session.post(self.url + path, data=body, timeout=PATIENCE_S)
        assert 400 <= response.status_code < 500, (path, body[:100], response.text)
        assert response.json()["error"]

    def change(self) -> None:
        assert self._post("/api/create", {"name": self.name, "modelpath": str(self.file)}).ok
        body = {"name": self.name}
        assert self.session.delete(f"{self.url}/api/delete", json=body, timeout=PATIENCE_S).status_code == 200

    def _asked(self) -> dict[str, object]:
        turns = [{"role": "user", "content": self._words()} for _ in range(self.chance.randint(1, 3))]
        options = self._options()
        return {"model": self.chance.choice(MODELS), "messages": turns, "options": options, "max_tokens": 8}

    def _options(self) -> dict[str, object]:
        chance = self.chance
        some = {"temperature": chance.random(), "top_k": chance.randint(1, 90), "seed": chance.randint(0, 9)}
        chosen = {name: value for name, value in {**some, "stop": "e"}.items() if chance.random() < 0.5}
        return {**chosen, "num_predict": chance.randint(1, 8)}

    def _words(self) -> str:
        return " ".join(self.chance.choices(WORDS, k=self.chance.randint(1, 20)))

    def _get(self, path: str) -> None:
        assert self.session.get(self.url + path, timeout=PATIENCE_S).status_code == 200, path

    def _post(self, path: str, body: object) -> requests.Response:
        response = self.session.post(self.url + path, json=body, timeout=PATIENCE_S)
        assert response.status_code == 200, response.text
        return response


ACTIONS: list[tuple[Callable[[Visitor], None], int]] = [
    (Visitor.chat, 25),
    (Visitor.generate, 5),
    (Visitor.leave, 5),
    (Visitor.look, 30),
    (Visitor.show, 10),
    (Visitor.err, 20),
    (Visitor.change, 5),
]
