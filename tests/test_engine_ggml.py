"""The orders that weights may lie in, and Intel's AMX where llama.cpp's code for it does not work."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from llama_cpp import _ggml

from rustllama import amx_child
from rustllama.engine.ggml import AMX, RIGHT, Orders
from rustllama.engine.native import library

REPACK = b"CPU_REPACK"


@dataclass
class Listed(Orders):
    """Orders that somebody's llama.cpp has."""

    listed: list[bytes] = field(default_factory=lambda: [AMX, REPACK])

    @property
    def names(self) -> list[bytes]:
        return self.listed

    def remove(self, name: bytes) -> None:
        self.listed.remove(name)


@pytest.mark.parametrize(("works", "left"), [(True, [AMX, REPACK]), (False, [REPACK])])
def test_amx_is_left_where_it_does_not_work(works: bool, left: list[bytes]) -> None:
    orders = Listed()
    assert library.leave_amx_where_broken(orders, lambda: works) is not works
    assert orders.names == left


def test_nothing_is_tried_where_there_is_no_amx() -> None:
    def never() -> bool:
        raise AssertionError

    assert not library.leave_amx_where_broken(Listed([REPACK]), never)


def test_a_process_that_dies_says_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, works in [(f"print('{RIGHT.decode()}', end='')", True), ("import os; os.kill(os.getpid(), 4)", False)]:
        monkeypatch.setattr(library, "_AMX_CHILD", (sys.executable, "-c", program))
        assert library.amx_works() is works
    monkeypatch.setattr(library, "_AMX_CHILD", ("/no/such/program",))
    assert not library.amx_works()


def test_what_the_child_expects_is_what_ggml_computes() -> None:
    assert amx_child.product(_ggml.libggml) == amx_child.expected()


def test_amx_is_left_in_this_process_exactly_where_a_new_one_cannot_use_it() -> None:
    """The library settled it when it was loaded, here as in a server; a child has the whole list of orders again."""
    program = (
        "from llama_cpp import _ggml; from rustllama.engine.ggml import AMX, Orders;"
        "print(AMX in Orders(_ggml.libggml).names)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    has_amx = done.stdout.strip() == "True"
    assert library.LEFT_AMX is (has_amx and not library.amx_works())
    assert (AMX in Orders(_ggml.libggml).names) is (has_amx and not library.LEFT_AMX)


def test_an_order_that_is_removed_is_no_longer_on_llama_cpps_list() -> None:
    program = (
        "from llama_cpp import _ggml; from rustllama.engine.ggml import Orders; orders = Orders(_ggml.libggml);"
        "before = orders.names; before and orders.remove(before[0]); print(before[1:] == Orders(_ggml.libggml).names)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_library_without_these_functions_has_no_orders() -> None:
    assert Orders(ctypes.CDLL(None)).names == []
