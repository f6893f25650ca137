"""Who waits for whose template: the lanes, and what becomes of those that are too slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import gevent
import pytest

from rustllama.api.renderer import Renderer
from rustllama.core import Span
from rustllama.errors import Busy, InternalError, TemplateRefused, TemplateTooCostly
from rustllama.template_helper import TemplateHelper
from rustllama.templates import CHATML, Messages, TemplateSource
from tests.test_template_helper import LOOP, MORE

SLOW_ON_DEMAND = "{% if messages[0].content == 'slow' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
QUICK = "{{ messages[0].content }}"
SLOW = {"role": "user", "content": "slow"}


@dataclass(slots=True)
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(slots=True)
class Rig:
    """A renderer with real helpers of a short deadline, and its clock."""

    renderer: Renderer
    helpers: list[TemplateHelper]
    clock: Clock

    def render(self, template: str | None, message: dict[str, str] = MORE, *, brought: bool = False) -> str:
        source = TemplateSource((template or "").encode(), template, "", "", ())
        (prompt,) = self.renderer.render(source, [[message]], brought=brought, limit_bytes=1000)
        return "".join(span.text for span in prompt)

    def fail(self, template: str, message: dict[str, str] = MORE, *, brought: bool = False) -> TemplateRefused:
        with pytest.raises(TemplateRefused) as caught:
            self.render(template, message, brought=brought)
        return caught.value


@pytest.fixture
def rig() -> Rig:
    helpers: list[TemplateHelper] = []

    def helper() -> TemplateHelper:
        helpers.append(TemplateHelper(deadline_s=1))
        return helpers[-1]

    clock = Clock()
    return Rig(Renderer(helper, clock_s=clock), helpers, clock)


@pytest.mark.parametrize("template", [None, CHATML])
def test_the_usual_template_needs_no_helper(rig: Rig, template: str | None) -> None:
    assert rig.render(template) == "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    assert [helper.pid for helper in rig.helpers] == [None, None]


@pytest.mark.parametrize("special", [("1x",), ("<" + "s" * 50,), tuple(f"<{n}>" for n in range(200))])
def test_the_usual_template_with_strange_tokens_needs_one(rig: Rig, special: tuple[str, ...]) -> None:
    source = TemplateSource(b"", CHATML, "", "", special)
    rig.renderer.render(source, [[MORE]], brought=False, limit_bytes=1000)
    assert rig.helpers[0].pid is not None


def test_templates_of_models_and_of_requests_have_a_helper_each(rig: Rig) -> None:
    rig.render(QUICK)
    assert rig.helpers[1].pid is None
    rig.render(QUICK, brought=True)
    assert None not in [helper.pid for helper in rig.helpers]


def test_who_is_expected_finds_the_helper_started(rig: Rig) -> None:
    source = TemplateSource(b"", QUICK, "", "", ())
    rig.renderer.expect(source, brought=False)
    with gevent.Timeout(60):
        while rig.helpers[0].pid is None:
            gevent.idle()
    before = rig.helpers[0].pid
    assert rig.renderer.render(source, [[MORE]], brought=False, limit_bytes=9) == ((Span("more", True),),)
    assert rig.helpers[0].pid == before


def test_a_bomb_of_a_request_does_not_stall_models(rig: Rig) -> None:
    rig.render(QUICK)
    bomb = gevent.spawn(rig.fail, LOOP, brought=True)
    gevent.idle()
    assert rig.render(QUICK) == "more"
    assert not bomb.ready()
    assert isinstance(bomb.get(), TemplateTooCostly)


def test_a_model_that_was_too_slow_moves_out_of_the_way_of_others(rig: Rig) -> None:
    assert isinstance(rig.fail(LOOP), TemplateTooCostly)
    bomb = gevent.spawn(rig.fail, LOOP)
    gevent.idle()
    assert rig.render(QUICK) == "more"
    assert not bomb.ready()
    bomb.join()


def test_those_who_wait_behind_a_slow_template_are_served_by_the_next_helper(rig: Rig) -> None:
    bombs = [gevent.spawn(rig.fail, LOOP) for _ in range(5)]
    gevent.idle()
    assert rig.render(QUICK) == "more"
    gevent.joinall(bombs)
    assert [isinstance(bomb.get(), TemplateTooCostly) for bomb in bombs] == [True, True, False, False, False]


def test_nobody_waits_for_ever_behind_slow_templates() -> None:
    hasty = Rig(Renderer(partial(TemplateHelper, deadline_s=1), patience_s=0.1), [], Clock())
    bomb = gevent.spawn(hasty.fail, LOOP)
    gevent.idle()
    with pytest.raises(Busy, match="slow chat templates"):
        hasty.render(QUICK)
    assert isinstance(bomb.get(), TemplateTooCostly)


def test_a_template_that_failed_twice_rests_for_a_minute(rig: Rig) -> None:
    rig.fail(LOOP)
    rig.fail(LOOP)
    rig.clock.now_s = 59
    assert "2 times in a row" in str(rig.fail(LOOP))
    rig.clock.now_s = 61
    assert isinstance(rig.fail(LOOP), TemplateTooCostly)
    assert not isinstance(rig.fail(LOOP), TemplateTooCostly)


def test_a_render_in_time_clears_a_template(rig: Rig) -> None:
    for _ in range(2):
        assert isinstance(rig.fail(SLOW_ON_DEMAND, SLOW), TemplateTooCostly)
        assert rig.render(SLOW_ON_DEMAND) == "more"


def test_other_refusals_are_not_held_against_a_template(rig: Rig) -> None:
    for _ in range(3):
        assert "refuses these messages: no" in str(rig.fail("{{ raise_exception('no') }}"))


class Counting(TemplateHelper):
    """Counts the calls of `render` that overlap."""

    inside = most = 0

    def render(
        self, source: TemplateSource, conversations: Sequence[Messages], *, limit_bytes: int
    ) -> tuple[tuple[Span, ...], ...]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            return super().render(source, conversations, limit_bytes=limit_bytes)
        finally:
            self.inside -= 1


def test_a_client_that_leaves_does_not_disturb_the_next() -> None:
    helper = Counting(deadline_s=1)
    rig = Rig(Renderer(lambda: helper), [helper], Clock())
    leaver = gevent.spawn(rig.fail, LOOP)
    with gevent.Timeout(60):
        while not helper.inside:
            gevent.idle()
    leaver.kill()
    assert rig.render(QUICK) == "more"
    assert helper.most == 1


def test_a_helper_that_does_not_start_is_told_when_it_is_needed() -> None:
    renderer = Renderer(partial(TemplateHelper, child=("/no/such/program",)))
    source = TemplateSource(b"", QUICK, "", "", ())
    renderer.expect(source, brought=False)
    with pytest.raises(InternalError, match="No such file"):
        renderer.render(source, [[MORE]], brought=False, limit_bytes=9)
