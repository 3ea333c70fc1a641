"""A head that replaces another waits for its name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorAlreadyExistsError

from deepopt.head import actor


class Ray:
    """Gives the name of a dead head away after a few refusals."""

    def __init__(self, *, refusals: int) -> None:
        self.refusals = refusals

    def remote(self, **_: Any) -> Any:
        return lambda _: self

    def options(self, **_: Any) -> Any:
        return SimpleNamespace(remote=self._create)

    def _create(self, arguments: Any) -> Any:
        self.refusals -= 1
        if self.refusals >= 0:
            raise ActorAlreadyExistsError("The name head is already taken")
        return "head"


ARGUMENTS: Any = SimpleNamespace(slots=SimpleNamespace(head_node_id="0" * 56))


def test_the_name_of_a_dead_head_may_be_free_a_little_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actor, "ray", Ray(refusals=3))
    monkeypatch.setattr(actor, "TICK_S", 0.0)
    assert actor.create_head(ARGUMENTS) == "head"


def test_a_name_that_stays_taken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "ray", Ray(refusals=10))
    monkeypatch.setattr(actor, "_NAME_TIMEOUT_S", 0.0)
    monkeypatch.setattr(actor, "TICK_S", 0.0)
    with pytest.raises(ActorAlreadyExistsError):
        actor.create_head(ARGUMENTS)
