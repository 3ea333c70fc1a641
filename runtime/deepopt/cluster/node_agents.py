"""The Ray shell of `node_agent`: one small detached actor a host, found again by its name.

Detached, so that a head that comes back finds the agents at work; they end with the job (`end_agents`),
or by themselves when their lease is over. One that dies is told of at once, because a call that never
ends is pending with it, and another takes its place (`renew`).
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray
from deepopt.cluster.node_agent import AgentWord, NodeAgent, ProcessEnded

logger = logging.getLogger(__name__)

NAME_PREFIX = "agent-"
STAY = "stay"  # concurrency group of the call that is pending as long as the process lives
MOST_UNDER_WAY = 20  # words of ten seconds: more, and the listener is not there


class AgentActor:
    """The process of one host's agent.

    Args:
        lease_s: how long it goes on without a listener.
    """

    def __init__(self, *, lease_s: float) -> None:
        self._listener: Any = None
        self._under_way: list[Any] = []
        self._lock = threading.Lock()
        self._agent = NodeAgent(tell=self._tell, lease_s=lease_s, lease_over=_end_process)

    def attach(self, listener: Any) -> int:
        """Tell a head from now on.

        Args:
            listener: handle of the head actor; takes words by `tell`.

        Returns:
            This process's id.
        """
        with self._lock:
            self._listener, self._under_way = listener, []
        return os.getpid()

    @ray.method(concurrency_group=STAY)
    def stay(self) -> None:
        """Never return: whoever calls hears of this process's end."""
        threading.Event().wait()

    def watch(self, pid: int) -> bool:
        """See `NodeAgent.watch`."""
        return self._agent.watch(pid)

    def kill(self, pids: list[int]) -> None:
        """See `NodeAgent.kill`."""
        self._agent.kill(pids)

    def living(self) -> list[int]:
        """See `NodeAgent.living`."""
        return self._agent.living()

    def _tell(self, word: AgentWord | ProcessEnded) -> bool:
        with self._lock:
            listener = self._listener
            if listener is None:
                return False
            taken, self._under_way = (
                ray.wait(self._under_way, num_returns=len(self._under_way), timeout=0)
                if self._under_way
                else ([], [])
            )
            heard = any(_was_taken(reference) for reference in taken)
            if len(self._under_way) < MOST_UNDER_WAY or isinstance(word, ProcessEnded):
                self._under_way.append(listener.tell.remote(word))
        return heard


def _end_process() -> None:
    os._exit(0)  # nobody is left to call it


def _was_taken(reference: Any) -> bool:
    try:
        ray.get(reference)
    except Exception:  # noqa: BLE001 - whatever it is, nobody has taken it
        return False
    return True


class NodeAgents:
    """The agents of a job as the head sees them.

    Args:
        head: handle of the head actor.
        lease_s: see `NodeAgent`.
        lost: called with Ray's id of a host whose agent has ended, from any thread; not for one that
            never came up.
    """

    def __init__(
        self, *, head: Any, lease_s: float, lost: Callable[[str], None] = lambda _: None
    ) -> None:
        self._head = head
        self._lease_s = lease_s
        self._lost = lost
        self._agents: dict[str, Any] = {}
        self._given_up: set[str] = set()  # names

    def on(self, node_id: str) -> Any:
        """The handle of a host's agent, which is started when there is none.

        Args:
            node_id: Ray's id of the host.
        """
        agent = self._agents.get(node_id)
        if agent is None:
            name, agent = self._find(node_id) or self._start(node_id)
            came_up = threading.Event()
            agent.attach.remote(self._head).future().add_done_callback(
                lambda answer: None if answer.exception() else came_up.set()
            )
            self._agents[node_id] = agent
            agent.stay.remote().future().add_done_callback(
                partial(self._on_end, node_id, name, agent, came_up)
            )
        return agent

    def renew(self, node_id: str) -> Any:
        """Start another agent on a host whose agent has ended or is silent; its handle."""
        before = self._agents.pop(node_id, None)
        if before is not None:
            ray.kill(before, no_restart=True)
            self._given_up |= set(self._names(node_id))
        return self.on(node_id)

    def _names(self, node_id: str) -> list[str]:
        names = ray.util.list_named_actors()
        return [name for name in names if name.startswith(f"{NAME_PREFIX}{node_id}")]

    def _find(self, node_id: str) -> tuple[str, Any] | None:
        """The agent that a head before this one has left there."""
        for name in self._names(node_id):
            if name not in self._given_up:
                with suppress(ValueError):  # it has ended meanwhile
                    return name, ray.get_actor(name)
        return None

    def _start(self, node_id: str) -> tuple[str, Any]:
        # Never the same name twice: Ray may say for long that a dead actor's is taken.
        name = f"{NAME_PREFIX}{node_id}-{uuid.uuid4().hex}"
        as_actor: Any = ray.remote
        agent = (
            as_actor(concurrency_groups={STAY: 1})(AgentActor)
            .options(
                name=name,
                lifetime="detached",
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
            )
            .remote(lease_s=self._lease_s)
        )
        return name, agent

    def _on_end(
        self, node_id: str, name: str, agent: Any, came_up: threading.Event, ended: Any
    ) -> None:
        logger.warning("agent %s is gone: %s", name, ended.exception())
        self._given_up.add(name)
        # One that never came up has no host any more, or nothing starts there.
        if came_up.is_set() and self._agents.get(node_id) is agent:
            self._lost(node_id)


def end_detached() -> None:
    """End what the calling driver's job has left in a cluster that goes on."""
    for name in ray.util.list_named_actors():
        with suppress(ValueError, RayError):  # it has ended meanwhile
            ray.kill(ray.get_actor(name))
