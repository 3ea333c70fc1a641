"""The plan file: what a profile measured and what was decided from it, as data with every check.

Pure. `plan_text` writes it as YAML that people read and edit, and reads that back; `plan_check` says
whether it fits a job and the machines at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import Field

from deepopt.config_fields import Count, Index, Section, Text
from deepopt.errors import PlanError
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.orders import built_order, input_key
from deepopt.planner.plan import Plan
from deepopt.planner.profile import (
    MEGABYTE,
    SAME_SPEED,
    HardwareSection,
    LayerSection,
    LayerSizes,
    LayerTimes,
    LinkSection,
    ModelSection,
    PredictedSection,
    Source,
)
from deepopt.schedule.builders import BUILDERS
from deepopt.schedule.ir import PlacementKind, Schedule, parse_action
from deepopt.schedule.verify import verify

FORMAT: Literal[1] = 1


class PipelineSection(Section):
    """Ranks, and the order in which they work."""

    ranks: Count = Field(description="Of one pipeline.")
    replicas: Count = Field(description="Of the pipeline.")
    placement: PlacementKind
    schedule: Text = Field(description="A builder, or the name of the order under `orders`.")
    microbatches: Count = Field(description="Of one step, over all replicas.")
    groups: Count = Field(description="Gradient groups of one step.")
    order: tuple[Index, ...] = Field(
        default=(), description="The rank at each position of the placement; none: 0, 1, 2, ..."
    )
    recompute: tuple[Text, ...] | None = Field(
        default=None,
        description="Names of the layers that run again for their backward; null: none or all of "
        "them, as the job's pipeline.recompute says.",
    )


class StageSection(Section):
    """A range of layers and the pipeline ranks that hold it."""

    first: Text = Field(description="Name of its first layer.")
    last: Text = Field(description="Name of its last layer.")
    ranks: tuple[Index, ...]


class PlanFile(Section):
    """A whole plan file."""

    format: Literal[1]
    made: str = ""
    source: Source
    basis: str = Field(default="", description="What figures that nobody measured rest on.")
    model: ModelSection
    hardware: HardwareSection
    pipeline: PipelineSection
    predicted: PredictedSection | None = None
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    layers: Annotated[tuple[LayerSection, ...], Field(min_length=1)]
    orders: tuple[tuple[str, ...], ...] = Field(
        default=(), description="Of each replica, a line of actions a rank; none for a builder."
    )

    def resolved(self) -> tuple[tuple[LayerTimes, LayerSizes], ...]:
        """Times and sizes of each layer, with `like` followed."""
        found: dict[str, tuple[LayerTimes, LayerSizes]] = {}
        for layer in self.layers:
            times, sizes = layer.times_ms, layer.sizes_mb
            if layer.like is not None:
                if layer.like not in found:
                    raise PlanError(
                        f"layer {layer.name} is like {layer.like}, which is no earlier layer",
                        remedy="name a layer above it",
                    )
                times, sizes = times or found[layer.like][0], sizes or found[layer.like][1]
            assert times is not None, "a layer without figures was refused"
            assert sizes is not None, "a layer without figures was refused"
            found[layer.name] = (times, sizes)
        return tuple(found[layer.name] for layer in self.layers)

    def costs(self) -> LayerCosts:
        """What the layers cost, for the planner and the simulator."""
        figures = self.resolved()
        times = [own for own, _ in figures]
        sizes = [own for _, own in figures]
        recomputes = any(own.prepare for own in times)

        def seconds(name: str) -> tuple[float, ...]:
            return tuple(getattr(own, name) * 1e-3 for own in times)

        def num_bytes(*names: str) -> tuple[float, ...]:
            return tuple(sum(getattr(own, name) for name in names) * MEGABYTE for own in sizes)

        links: dict[str, Any] = _link_costs(self.hardware, self.pipeline.ranks)
        links |= _background(self.hardware, threads=self.model.threads)
        costs = LayerCosts(
            forward_s=seconds("forward"),
            input_s=seconds("input"),
            weight_s=seconds("weight"),
            prepare_s=seconds("prepare") if recomputes else (),
            update_s=seconds("update"),
            warm_up_s=seconds("warm_up") if any(own.warm_up for own in times) else (),
            activation_bytes=num_bytes("activation"),
            input_bytes=num_bytes("input") if recomputes else (),
            output_bytes=num_bytes("output"),
            gradient_bytes=num_bytes("gradients"),
            state_bytes=num_bytes("parameters", "gradients", "optimizer"),
            rank_factor=rank_factors(self.hardware, ranks=self.pipeline.ranks),
            memory_bytes=_memory_bytes(self.hardware, self.pipeline.ranks),
            counted=tuple(
                i for i, one in enumerate(self.layers) if one.name in self.model.routers
            ),
            ties=self._ties(),
            source=self.source,
            **links,
        )
        if self.pipeline.recompute is None:
            return costs
        chosen = set(self.pipeline.recompute)
        return costs.recomputing([i for i, one in enumerate(self.layers) if one.name in chosen])

    def _ties(self) -> tuple[tuple[int, int, float], ...]:
        index = {layer.name: i for i, layer in enumerate(self.layers)}
        for tie in self.model.ties:
            for name in tie.layers:
                if name not in index:
                    raise PlanError(
                        f"model.ties names layer {name}, which the plan does not have",
                        remedy="name layers of the plan",
                    )
        return tuple(
            (index[tie.layers[0]], index[tie.layers[1]], tie.mb * MEGABYTE)
            for tie in self.model.ties
        )

    def plan(self, *, plan_id: int) -> Plan:
        """Who holds which layers.

        Args:
            plan_id: number of the plan in its job.

        Raises:
            PlanError: the stages do not cut the layers.
        """
        index = {layer.name: i for i, layer in enumerate(self.layers)}
        pipeline = self.pipeline
        return Plan(
            plan_id=plan_id,
            layer_names=tuple(layer.name for layer in self.layers),
            boundaries=tuple(index[stage.first] for stage in self.stages),
            placement=pipeline.placement,
            schedule=pipeline.schedule,
            pipeline_size=pipeline.ranks,
            data_size=pipeline.replicas,
            num_microbatches=pipeline.microbatches,
            num_groups=pipeline.groups,
            orders=tuple(input_key({"rows": rows}) for rows in self.orders),
            order=pipeline.order,
            recompute=None
            if pipeline.recompute is None
            else tuple(_known(index, name) for name in pipeline.recompute),
        )

    def schedules(self) -> tuple[Schedule, ...]:
        """The order of each replica, verified.

        Raises:
            PlanError: no such builder.
            ScheduleError: an order is wrong.
        """
        plan = self.plan(plan_id=1)
        placement = plan.make_placement()
        found = []
        for replica in range(plan.data_size):
            directions = plan.directions(replica)
            if self.orders:
                schedule = Schedule(
                    name=plan.schedule,
                    placement=placement,
                    directions=directions,
                    actions=tuple(
                        tuple(map(parse_action, row.split())) for row in self.orders[replica]
                    ),
                )
            elif plan.schedule in BUILDERS:
                schedule = built_order(plan, data_index=replica)
            else:
                raise PlanError(
                    f"pipeline.schedule {plan.schedule} is no builder, and the plan has no orders",
                    remedy=f"known builders: {', '.join(BUILDERS)}",
                )
            verify(schedule)
            found.append(schedule)
        return tuple(found)


def _known(index: Mapping[str, int], name: str) -> int:
    if name not in index:
        raise PlanError(
            f"pipeline.recompute names layer {name}, which the plan does not have",
            remedy="name layers of the plan",
        )
    return index[name]


def rank_factors(hardware: HardwareSection, *, ranks: int) -> tuple[float, ...]:
    """How slow each pipeline rank is: its slowest replica; empty where all are alike.

    Args:
        hardware: its devices are in the order of world ranks.
        ranks: of one pipeline.
    """
    factors = [device.factor for device in hardware.devices]
    slowest = tuple(max(factors[rank::ranks]) for rank in range(ranks))
    if all(abs(factor - 1) <= SAME_SPEED for factor in slowest):
        return ()
    return slowest


def _memory_bytes(hardware: HardwareSection, ranks: int) -> tuple[float, ...]:
    """Memory of each pipeline rank; none on CPUs, which share the memory of their host."""
    devices = hardware.devices
    if any(device.device == "cpu" or not device.memory_mb for device in devices):
        return ()
    return tuple(
        min(device.memory_mb for device in devices[rank::ranks]) * MEGABYTE
        for rank in range(ranks)
    )


def _link_costs(hardware: HardwareSection, ranks: int) -> dict[str, Any]:
    """The links as `LayerCosts` knows them: one kind inside a host, one between hosts."""
    inside = [link for link in hardware.links if link.hosts[0] == link.hosts[1]]
    across = [link for link in hardware.links if link.hosts[0] != link.hosts[1]]
    hosts = [device.host for device in hardware.devices[:ranks]]
    numbers = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
    several = len(numbers) > 1
    costs: dict[str, Any] = {"agree_s": hardware.exchange_us * 1e-6}
    near = inside or across
    if near:
        costs["latency_s"], costs["bytes_per_s"] = _middle(near)
        costs |= _message_costs(hardware, near)
        # Both ends' part of it is counted as theirs.
        costs["latency_s"] = max(0.0, costs["latency_s"] - 2 * costs["message_s"])
    if several and across:
        costs["host_of"] = tuple(numbers[host] for host in hosts)
        costs["inter_host_latency_s"], costs["inter_host_bytes_per_s"] = _middle(across)
    return costs


def _message_costs(hardware: HardwareSection, links: list[LinkSection]) -> dict[str, Any]:
    """CPU time of a message at each end: of all threads where workers share cores, else of the thread
    that trains; nothing on GPUs, whose messages go by themselves."""
    if any(device.device == "cuda" for device in hardware.devices):
        return {"message_s": 0.0}
    if hardware.shared_cores is None:
        return {"message_s": median(link.cpu_us for link in links) * 1e-6}
    rates = [link.core_gb_per_s for link in links if link.core_gb_per_s is not None]
    return {
        "message_s": median(link.core_us for link in links) * 1e-6,
        "message_bytes_per_s": median(rates) * 1e9 if rates else None,
    }


def _background(hardware: HardwareSection, *, threads: int) -> dict[str, Any]:
    """What else takes cores that workers share, in places of a worker: such cores are those of one host."""
    if hardware.shared_cores is None:
        return {}
    return {
        "background_processes": sum(own.processes for own in hardware.background) / threads,
        "background_threads": sum(own.threads for own in hardware.background) / threads,
    }


def _middle(links: list[LinkSection]) -> tuple[float, float | None]:
    """Median latency in seconds and rate in bytes per second."""
    rates = [link.gb_per_s for link in links if link.gb_per_s is not None]
    return (
        median(link.latency_us for link in links) * 1e-6,
        median(rates) * 1e9 if rates else None,
    )
