"""What a user names to pull from, how the model is called, and which quantization is taken."""

from __future__ import annotations

import pytest

from rustllama.addresses import is_public
from rustllama.errors import BadRequest
from rustllama.pull.quantization import Entry, choose, variants
from rustllama.pull.source import Image, Link, Repository, parse
from rustllama.registry import check_name


@pytest.mark.parametrize(
    ("text", "name", "origin"),
    [
        ("hf.co/user/Repo-GGUF", "hf.co/user/Repo-GGUF", "hf.co/user/Repo-GGUF"),
        ("hf.co/user/Repo-GGUF:Q8_0", "hf.co/user/Repo-GGUF:Q8_0", "hf.co/user/Repo-GGUF:Q8_0"),
        ("https://huggingface.co/user/Repo-GGUF/tree/main", "hf.co/user/Repo-GGUF", "hf.co/user/Repo-GGUF"),
        ("https://huggingface.co/u/r/resolve/main/a/B.gguf?download=true", "b", "hf.co/u/r/a/B.gguf"),
        ("https://x.example/a/Llama%203-00001-of-00002.gguf?key=1", "llama-3", None),
        ("http://localhost:8000/.gguf", "model", None),
        ("registry.example/library/llama3.2:3b", "registry.example/library/llama3.2:3b", None),
        ("localhost:5000/a/b", "localhost-5000/a/b", "localhost:5000/a/b:latest"),
        ("llama3.2", "llama3.2", "registry.example/library/llama3.2:latest"),
        ("user/model:7b", "user/model:7b", "registry.example/user/model:7b"),
    ],
)
def test_a_source_gives_a_name_and_tells_where_it_is(text: str, name: str, origin: str | None) -> None:
    source = parse(text, registry="registry.example")
    assert source.name == name
    assert origin is None or source.origin == origin
    assert "?" not in source.origin


@pytest.mark.parametrize(
    "text", ["hf.co/u/r:Q4_K_M", "https://x.example/%E2%82%AC.gguf", "user/model:7b", "[::1]:5000/a/b:c"]
)
def test_every_name_that_is_given_is_one(text: str) -> None:
    name = parse(text, registry="r.example").name
    assert check_name(name) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "hf.co/user", "hf.co/user/repo/x", "hf.co/u/r/blob/main/x.bin", "ftp://x.example/a.gguf"),
        *("http://example.com/a.gguf", "https://u:p@x.example/a.gguf", "https://x.example/a.bin", "https:///a.gguf"),
        *("llama3.2", "user/model", "../../etc/passwd", "a b", "x" * 3000, "https://[::1/a.gguf", "hf.co/../..:x"),
    ],
)
def test_what_is_no_source_is_one_sentence(text: str) -> None:
    with pytest.raises(BadRequest) as failed:
        parse(text)
    assert str(failed.value).endswith(".")


def test_the_kinds_of_sources_are_told_apart() -> None:
    assert isinstance(parse("HF.co/u/r"), Repository)
    assert isinstance(parse("https://hf.example/u/r.gguf"), Link)
    assert isinstance(parse("quay.example/u/r"), Image)


def files(*names: str) -> list[Entry]:
    return [Entry(name, 1000 * (number + 1)) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf"), "Q4_K_M"),
        (("m-Q8_0.gguf", "m-Q2_K.gguf", "m.Q5_K_M.gguf"), "Q5_K_M"),
        (("m-f16.gguf", "m-q4_0.gguf"), "Q4_0"),
        (("m-IQ2_XXS.gguf", "m-BF16.gguf", "m-UD-Q4_K_XL.gguf"), "UD-Q4_K_XL"),
        (("m-Q8_0.gguf", "m-Q6_K.gguf"), "Q6_K"),
        (("Q4_K_M/m-00001-of-00002.gguf", "Q4_K_M/m-00002-of-00002.gguf", "m-Q8_0.gguf"), "Q4_K_M"),
        (("mmproj-m-Q4_K_M.gguf", "m-imatrix.gguf", "m.gguf"), "m"),
    ],
)
def test_the_preferred_quantization_or_the_nearest_is_chosen(names: tuple[str, ...], label: str) -> None:
    assert choose(variants(files(*names)), None, "hf.co/u/r").label == label


def test_a_split_model_that_lacks_a_part_is_none() -> None:
    assert variants(files("m-Q8_0-00001-of-00002.gguf")) == []


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "192.168.0.1",
            "169.254.1.1",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "::1",
            "fc00::1",
        ),
        *("fe80::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "nobody"),
    ],
)
def test_an_address_that_is_not_of_the_open_internet_is_known(address: str) -> None:
    assert not is_public(address)


def test_an_address_of_the_open_internet_is_public() -> None:
    assert is_public("8.8.8.8")
    assert is_public("2606:4700::1111")
