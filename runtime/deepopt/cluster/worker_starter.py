"""Starts workers' processes at places: what Ray is asked for, and whose GPUs a process takes.

Ray lends a GPU to the process that asked for it first, for as long as that lives; one that takes its place
later, as a spare does, asks for none and is told which it was.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

import ray
from deepopt.cluster.slots import Slots
from deepopt.worker.actor import REQUESTS, STAY, WorkerActor

_ray: Any = ray  # its annotations are half there

WORKER_NAME = "worker-"


class WorkerStarter:
    """Starts processes for the places of a job.

    Args:
        slots: where workers may run.
        run_dir: the run directory.
        stage_worker: import path of the class that does the work.
    """

    def __init__(self, slots: Slots, *, run_dir: Path, stage_worker: str) -> None:
        self._slots = slots
        self._arguments = {"run_dir": str(run_dir), "stage_worker": stage_worker}
        self._gpus: dict[int, tuple[str, ...]] = {}  # of each place
        # Ray unpickles a class by its import path: workers need deepopt, not this process.
        as_actor: Any = ray.remote  # its annotations lack concurrency groups
        self._actor_class = as_actor(concurrency_groups={REQUESTS: 1, STAY: 1})(WorkerActor)

    def start_worker(self, place: int, *, log: Path, is_first: bool) -> Any:
        """Start a process at a place: with the GPUs that were lent there before, if any were.

        Args:
            place: index of the place.
            log: takes its output.
            is_first: whether no generation has been before: hosts have the ids that they had then.

        Returns:
            Its actor.
        """
        owns = place not in self._gpus
        actor = self._start(place, log=log, owns=owns, is_first=is_first)
        self.give_gpus(place, actor)
        return actor

    def start_spare(self, place: int, *, log: Path, is_first: bool) -> Any:
        """Start a process on the host of a place, without a claim to it; as `start_worker`."""
        return self._start(place, log=log, owns=False, is_first=is_first)

    def start_seeker(self, place: int, *, log: Path, is_first: bool) -> Any:
        """Start a process once there is a device at a place; as `start_worker`."""
        self._gpus.pop(place, None)  # of a host that may have come back: Ray gives it others
        return self._start(place, log=log, owns=True, is_first=is_first)

    def note_gpus(self, place: int, gpus: tuple[str, ...]) -> None:
        """Remember what Ray has lent at a place."""
        if gpus:
            self._gpus[place] = gpus

    def give_gpus(self, place: int, actor: Any) -> None:
        """Tell a process the GPUs of the place that it takes."""
        if gpus := self._gpus.get(place):
            actor.use_gpus.remote(gpus)

    def _start(self, place: int, *, log: Path, owns: bool, is_first: bool) -> Any:
        options = self._options(place, owns=owns, is_first=is_first)
        return self._actor_class.options(**options).remote(log=str(log), **self._arguments)

    def _options(self, index: int, *, owns: bool, is_first: bool) -> Mapping[str, Any]:
        slots, place = self._slots, self._slots.places[index]
        options: dict[str, Any] = {
            # Detached: it lives on when this head dies, and the next one finds it by its name.
            "name": f"{WORKER_NAME}{uuid.uuid4().hex}",
            "lifetime": "detached",
            "num_cpus": int(owns and not slots.use_gpus),
            "num_gpus": int(owns and slots.use_gpus),
            "max_restarts": 0,  # the head restarts; so a death is heard of at once
            "max_task_retries": 0,
        }
        if place.bundle_index is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=slots.placement_group,
                placement_group_bundle_index=place.bundle_index,
            )
        elif place.node_id is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                node_id=place.node_id if is_first else _living_node(place.node_id),
                soft=False,
            )
        if slots.worker_environment:
            options["runtime_env"] = {"env_vars": dict(slots.worker_environment)}
        return options


def _living_node(node_id: str) -> str:
    """The id that a host has now: it has another one when its Ray was started again."""
    nodes: list[Any] = _ray.nodes()
    address = next((n["NodeManagerAddress"] for n in nodes if n["NodeID"] == node_id), None)
    living = [n["NodeID"] for n in nodes if n["Alive"] and n["NodeManagerAddress"] == address]
    return node_id if node_id in living or not living else str(living[-1])
