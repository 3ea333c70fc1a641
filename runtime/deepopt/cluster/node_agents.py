"""The Ray shell of `node_agent`: one small detached actor a host, found again by its name.

Detached, so that a head that comes back finds the agents at work; they end with the job (`end_agents`),
or by themselves when their lease is over.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray
from deepopt.cluster.node_agent import AgentWord, NodeAgent, ProcessEnded

logger = logging.getLogger(__name__)

NAME_PREFIX = "agent-"
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
    """

    def __init__(self, *, head: Any, lease_s: float) -> None:
        self._head = head
        self._lease_s = lease_s
        self._agents: dict[str, Any] = {}

    def on(self, node_id: str) -> Any:
        """The handle of a host's agent, which is started when there is none.

        Args:
            node_id: Ray's id of the host.
        """
        agent = self._agents.get(node_id)
        if agent is None:
            as_actor: Any = ray.remote
            agent = (
                as_actor(AgentActor)
                .options(
                    name=f"{NAME_PREFIX}{node_id}",
                    lifetime="detached",
                    get_if_exists=True,
                    num_cpus=0,
                    max_restarts=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(
                        node_id=node_id, soft=False
                    ),
                )
                .remote(lease_s=self._lease_s)
            )
            agent.attach.remote(self._head)
            self._agents[node_id] = agent
        return agent


def end_detached() -> None:
    """End what the calling driver's job has left in a cluster that goes on."""
    for name in ray.util.list_named_actors():
        with suppress(ValueError, RayError):  # it has ended meanwhile
            ray.kill(ray.get_actor(name))
