"""One worker's process as the head knows it: where it is, whether it is gone, and how to end it.

It is killed by pid with SIGKILL, by the agent on its host and here, because Ray's own kill is a message
that a stopped process does not read.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

import ray
from deepopt.cluster.process_look import ExitLook
from deepopt.cluster.process_table import Process, find_process
from deepopt.worker.adopted import Whereabouts

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 0.1  # for a process to end that has closed its connections
_AGENT_TIMEOUT_S = 5.0  # for an agent's answer; its host may be gone


@dataclass(slots=True, kw_only=True, eq=False)
class WorkerProcess:
    """A process that works for the job, or waits to.

    Args:
        actor: Ray's handle of it; None where nobody has one any more.
        place: index of its place.
        log_size: bytes of its rank's log before it wrote there.
        pid: 0 until it runs.
        host: name of its host.
        node_id: Ray's id of that host.
        process: by which its end is seen; on the head's host only.
        exit: says how it ended; there, too.
        agent: handle of its host's agent, once that watches it.
        ended: its actor is gone, says Ray.
        warm: it waits and has everything ready.
        waits: for a place; its end is then nobody's loss.
        references: of calls that it answers when it waits no more.
    """

    actor: Any
    place: int = 0
    log_size: int = 0
    pid: int = 0
    host: str = ""
    node_id: str = ""
    process: Process | None = None
    exit: ExitLook | None = None
    agent: Any = None
    ended: bool = False
    warm: bool = False
    waits: bool = False
    references: list[Any] = field(default_factory=list)

    def note(self, found: Whereabouts, *, head_node_id: str) -> None:
        """Remember where it runs.

        Args:
            found: its own word.
            head_node_id: Ray's id of the host that this is called on.
        """
        self.host, self.node_id = found.host, found.node_id
        if found.node_id == head_node_id:
            self.process = find_process(found.pid)
            with suppress(OSError):  # it has ended already
                self.exit = ExitLook(found.pid)
        self.pid = found.pid  # last: it says that the others are there

    def kill(self) -> None:
        """End it, wherever it is; `is_gone` says when it has ended."""
        if self.agent is not None:
            self.agent.kill.remote([self.pid])
        if self.process is not None:  # the agent may be gone
            self.process.send(signal.SIGKILL)
        ray.kill(self.actor, no_restart=True)

    def exit_words(self) -> str:
        """How it ended, for people; empty where this host does not know."""
        return "" if self.exit is None else self.exit.words(timeout_s=_END_TIMEOUT_S)

    def is_gone(self) -> bool:
        """Whether there is no such process any more."""
        if self.process is not None:
            return not self.process.is_alive()
        if self.agent is not None and not self.ended:
            try:
                living = ray.get(self.agent.living.remote(), timeout=_AGENT_TIMEOUT_S)
            except RayError:  # the agent is gone, and its host with it, or silent
                return self.ended
            return self.pid not in living
        return self.ended


def when_answered(
    reference: Any,
    *,
    done: Callable[[Any], None],
    failed: Callable[[BaseException], None],
) -> None:
    """Have an answer of an actor taken, in a thread of Ray's.

    Args:
        reference: of the call; whoever calls keeps it until then.
        done: takes the answer.
        failed: takes what was raised, and the end of the actor.
    """

    def settle(future: Any) -> None:
        try:
            error = future.exception()
            if error is None:
                done(future.result())
            else:
                failed(error)
        except Exception:  # Ray would swallow it
            logger.exception("an answer of a worker could not be taken")

    reference.future().add_done_callback(settle)
