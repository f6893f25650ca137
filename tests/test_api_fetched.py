"""Of a model that was pulled, its origin is told, and of its parameters those hold that can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rustllama.api.options import usable
from rustllama.core import Preset
from tests.fakes import build_house, ok


def test_show_and_list_tell_where_a_model_is_from(tmp_path: Path) -> None:
    house = build_house(tmp_path)
    path = f"/models/blobs/sha256-{'ab' * 32}-00001-of-00002.gguf"
    house.registry.put(replace(house.registry.get("toy"), path=path, preset=Preset(origin="hf.co/user/toy:Q8_0")))
    for answer in (ok(house.get("/api/list"))["models"][0], ok(house.post("/api/show", model="toy"))):
        assert (answer["origin"], answer["sha256"]) == ("hf.co/user/toy:Q8_0", "ab" * 32)


def test_of_a_strangers_parameters_only_those_count_that_are_options() -> None:
    written = {"stop": ["<|end|>"], "temperature": "hot", "top_k": 7, "num_ctx": 1 << 40, "mirostat": 2, "seed": None}
    assert usable(written) == {"stop": ["<|end|>"], "top_k": 7}
