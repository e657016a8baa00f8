"""The arguments that choose a level and a budget."""

from __future__ import annotations

from typing import Any

import pytest

import kvhook
from tests.contracts.core_engines import SYNC
from tests.contracts.light.script import begin, go
from tests.levels.stepped_down import script

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("level", ["x", "", "Full", None, 1, "sparse"])
def test_a_level_that_there_is_not_is_refused(level: Any):
    with pytest.raises(kvhook.KvhookError, match=r"level=.*'full', 'light'"):
        kvhook.install(level=level)
    with kvhook.install() as session:
        assert session.level == "full"


@pytest.mark.parametrize("share", [0, 2, "a", True, False, -0.1, 1.0001, float("nan"), float("inf"), [0.01]])
def test_a_budget_that_is_no_share_is_refused(share: Any):
    with pytest.raises(kvhook.KvhookError, match="max_overhead is a share of the step time"):
        kvhook.install(max_overhead=share)
    with kvhook.install() as session:
        assert "recording" in repr(session)


@pytest.mark.parametrize("share", [1, 0.01, 1e-12])
def test_a_share_is_taken(share: float):
    with kvhook.install(max_overhead=share) as session:
        go(begin(SYNC, script=script(1)))
        assert session.meta["engines"][0]["max_overhead"] == share
        assert session.faults == {}


def test_installing_again_with_another_level_or_budget_warns_that_it_has_no_effect(said: Any):
    session = kvhook.install(max_overhead=0.5)
    assert kvhook.install() is kvhook.install(max_overhead=0.5) is kvhook.install(level="full") is session
    assert said() == []
    assert kvhook.install(level="light", max_overhead=0.1) is session
    level, budget = said()
    assert "level='light' has no effect" in level
    assert "max_overhead=0.1 has no effect" in budget
    assert all("kvhook.uninstall() first" in text for text in said())
    assert session.level == "full"


def test_after_uninstall_the_level_can_be_another():
    for level, code in (("light", 1), ("full", 0), ("light", 1)):
        with kvhook.install(level=level) as session:
            go(begin(SYNC, script=script(2)))
            assert session.steps()["level"].tolist() == [code] * 2
            assert session.faults == {}
