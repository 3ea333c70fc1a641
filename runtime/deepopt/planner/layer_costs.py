"""What each layer costs, in seconds and bytes, whatever the source; and the costs of stages from it.

Pure. State belongs to layers, and so do costs: a stage's cost is the sum over its layers, so one
`LayerCosts` prices every cut and every placement. It does not measure (`calibrate`) and does not
choose (`choose`).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepopt.errors import PlanError
from deepopt.schedule.ir import Placement
from deepopt.schedule.simulate import CostTable

_PER_LAYER = (
    "input_s",
    "weight_s",
    "prepare_s",
    "update_s",
    "warm_up_s",
    "activation_bytes",
    "input_bytes",
    "output_bytes",
    "gradient_bytes",
    "state_bytes",
    "host_forward_s",
    "host_input_s",
    "host_weight_s",
)
_PER_RANK = ("rank_factor", "memory_bytes", "host_of")
_MAY_NOT_BE_EMPTY = ("input_s", "weight_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Costs of the layers of a chain; an empty tuple means none, or not known.

    Args:
        forward_s: F of each layer on one micro-batch, on a rank of factor 1.
        input_s: I of each layer.
        weight_s: W of each layer; 0 where it is computed in I.
        prepare_s: R of each layer, 0 of one that is not recomputed; empty where none is.
        update_s: optimizer update of each layer, once a step, by each of its holders.
        warm_up_s: of each layer, by how much F is longer while its routers warm up; no part of `forward_s`.
        activation_bytes: of each layer, held for a micro-batch from F to the end of W; with
            recompute, from R on.
        input_bytes: of each layer, held for a micro-batch from F to R where it is recomputed.
        output_bytes: of each layer, sent per micro-batch if a cut follows it; its gradient comes
            back with as many.
        gradient_bytes: of each layer, exchanged between the copies of a stage once a step.
        state_bytes: parameters, gradients and moments of each layer, per copy.
        rank_factor: multiplies all compute of a pipeline rank; empty for 1.
        memory_bytes: memory of each pipeline rank for states and activations; empty for any.
        latency_s: from the end of a transfer to its arrival.
        bytes_per_s: of a route between two ranks; None for no limit.
        host_of: index of each pipeline rank's host; empty where all routes are alike.
        inter_host_latency_s: latency_s between ranks of different hosts.
        inter_host_bytes_per_s: bytes_per_s between ranks of different hosts.
        ties: weights with two uses: the layers of both, and bytes of the gradient of one.
        counted: layers with routers, whose tokens all holders of a layer sum once a step.
        action_s: what each action takes on top, whatever its stage: the price of small pieces.
        message_s: CPU time of a message at each of its ends, apart from its bytes.
        message_bytes_per_s: bytes that an end moves in a second of CPU time; None for no limit.
        agree_s: the exchange of all ranks at the end of a step.
        host_forward_s: CPU time of each layer's F where that is not what it lasts: on emulated devices,
            whose workers share the cores of one host; empty elsewhere.
        host_input_s: of I.
        host_weight_s: of W.
        host_cores: cores of that host; None elsewhere.
        background_processes: cores that deepopt's head and Ray take, on average, of those that workers share.
        background_threads: cores that the workers' threads beside the training take, all workers together.
        source: where the figures are from, in a word: measured, estimated, emulated, ...
    """

    forward_s: tuple[float, ...]
    input_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    prepare_s: tuple[float, ...] = ()
    update_s: tuple[float, ...] = ()
    warm_up_s: tuple[float, ...] = ()
    activation_bytes: tuple[float, ...] = ()
    input_bytes: tuple[float, ...] = ()
    output_bytes: tuple[float, ...] = ()
    gradient_bytes: tuple[float, ...] = ()
    state_bytes: tuple[float, ...] = ()
    rank_factor: tuple[float, ...] = ()
    memory_bytes: tuple[float, ...] = ()
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    host_of: tuple[int, ...] = ()
    inter_host_latency_s: float = 0.0
    inter_host_bytes_per_s: float | None = None
    ties: tuple[tuple[int, int, float], ...] = ()
    counted: tuple[int, ...] = ()
    action_s: float = 0.0
    message_s: float = 0.0
    message_bytes_per_s: float | None = None
    agree_s: float = 0.0
    host_forward_s: tuple[float, ...] = ()
    host_input_s: tuple[float, ...] = ()
    host_weight_s: tuple[float, ...] = ()
    host_cores: int | None = None
    background_processes: float = 0.0
    background_threads: float = 0.0
    source: str

    def __post_init__(self) -> None:
        num_layers = len(self.forward_s)
        for name in _PER_LAYER:
            figures: tuple[float, ...] = getattr(self, name)
            if len(figures) != num_layers and (figures or name in _MAY_NOT_BE_EMPTY):
                raise PlanError(
                    f"the costs name {num_layers} layers in forward_s, {len(figures)} in {name}",
                    remedy="give one figure for each layer of the model",
                )
        for name in ("forward_s", *_PER_LAYER, *_PER_RANK):
            for index, figure in enumerate(getattr(self, name)):
                if not 0 <= figure < float("inf"):
                    raise PlanError(
                        f"the costs hold {name}[{index}] = {figure}",
                        remedy="costs are finite and not negative",
                    )
        for name in (
            "latency_s",
            "inter_host_latency_s",
            "action_s",
            "message_s",
            "agree_s",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise PlanError(f"{name} {getattr(self, name)} must be finite and not negative")
        for first, second, size in self.ties:
            if not (0 <= first < num_layers and 0 <= second < num_layers and size >= 0):
                raise PlanError(
                    f"layers {first} and {second} cannot share {size} bytes of weights in a chain "
                    f"of {num_layers}",
                    remedy="name two layers of the chain and the bytes of a gradient",
                )
        for rate in (self.bytes_per_s, self.inter_host_bytes_per_s, self.message_bytes_per_s):
            if rate is not None and not 0 < rate < float("inf"):
                raise PlanError(
                    f"a route of {rate} bytes/s carries nothing",
                    remedy="give a positive rate, or none for no limit",
                )
        if not self.host_of and (self.inter_host_latency_s or self.inter_host_bytes_per_s):
            raise PlanError(
                "the costs price routes between hosts and do not say where the ranks are",
                remedy="give host_of, one host for each pipeline rank",
            )

    @property
    def num_layers(self) -> int:
        """Layers of the chain."""
        return len(self.forward_s)

    @property
    def recomputes(self) -> bool:
        """Whether there is an R: some layer is run again for its backward."""
        return any(self.prepare_s)

    @property
    def kept_bytes(self) -> tuple[float, ...]:
        """Of each layer, what F leaves of a micro-batch: its input, where it is recomputed."""
        if not self.recomputes or not self.activation_bytes:
            return self.activation_bytes
        given_bytes = self.input_bytes or (0.0,) * self.num_layers
        rows = zip(self.prepare_s, given_bytes, self.activation_bytes, strict=True)
        return tuple(min(given, whole) if again else whole for again, given, whole in rows)

    def recomputing(self, layers: Collection[int]) -> LayerCosts:
        """The same chain where these of the layers that can be run again are, and no others.

        Args:
            layers: indices.
        """
        prepare_s = tuple(
            again if index in layers else 0.0 for index, again in enumerate(self.prepare_s)
        )
        return replace(self, prepare_s=prepare_s if any(prepare_s) else ())

    def warming_up(self, share: float) -> LayerCosts:
        """The same chain in a step in which some of its routers warm up; which of them is not told apart.

        Args:
            share: of the routers, 0 to 1.
        """
        if not share or not self.warm_up_s:
            return self
        rows = zip(self.forward_s, self.warm_up_s, strict=True)
        return replace(self, forward_s=tuple(own + share * more for own, more in rows))

    def on_ranks(self, order: Sequence[int]) -> LayerCosts:
        """The same layers with the ranks in another order.

        Args:
            order: the rank at each position.
        """
        changed: dict[str, Any] = {
            name: tuple(getattr(self, name)[rank] for rank in order)
            for name in _PER_RANK
            if getattr(self, name)
        }
        return replace(self, **changed)

    def on_any_ranks(self, count: int) -> LayerCosts:
        """The same layers on another number of these ranks, whichever they are: with one speed, the memory of
        the smallest, and routes as they are between hosts where there are several.

        Args:
            count: of the ranks.
        """
        apart = len(set(self.host_of)) > 1
        return replace(
            self,
            rank_factor=(),
            memory_bytes=(min(self.memory_bytes),) * count if self.memory_bytes else (),
            host_of=(),
            latency_s=self.inter_host_latency_s if apart else self.latency_s,
            bytes_per_s=self.inter_host_bytes_per_s if apart else self.bytes_per_s,
            inter_host_latency_s=0.0,
            inter_host_bytes_per_s=None,
        )

    def names_ranks(self, count: int) -> bool:
        """Whether what is known of single ranks is of so many, or nothing is.

        Args:
            count: of the ranks.
        """
        return all(len(getattr(self, name)) in (0, count) for name in _PER_RANK)

    @property
    def knows_memory(self) -> bool:
        """Whether both the sizes of activations and the memory of ranks are known."""
        return bool(self.memory_bytes) and any(self.activation_bytes)

    @property
    def work_s(self) -> tuple[float, ...]:
        """All compute of each layer on one micro-batch, on a rank of factor 1."""
        prepare_s = self.prepare_s or (0.0,) * self.num_layers
        ops = zip(self.forward_s, self.input_s, self.weight_s, prepare_s, strict=True)
        return tuple(map(sum, ops))

    def table(
        self, boundaries: Sequence[int], *, placement: Placement, num_replicas: int = 1
    ) -> CostTable:
        """The costs of the stages of a cut.

        All tensors take the time of the largest one that crosses a cut. Where a stage has several
        copies (mirror placement, replicas), its gradients cross a route once for each other
        copy, between hosts where the copies lie on several (replicas do, where hosts are named);
        the second update follows from the placement. Tokens that routers counted are summed when all
        gradients are.

        Args:
            boundaries: index of the first layer of each stage.
            placement: stages on ranks.
            num_replicas: replicas of the pipeline (parallel.data).

        Raises:
            PlanError: boundaries, placement and costs are of other sizes.
        """
        self._check_cut(boundaries, placement)
        held_by = [placement.copies_of(stage) for stage in range(len(boundaries))]
        reduce_s = [0.0] * len(boundaries)
        if self.gradient_bytes:
            sizes = self.per_stage(self.gradient_bytes, boundaries)
            for stage, (ranks, size) in enumerate(zip(held_by, sizes, strict=True)):
                reduce_s[stage] = self._exchange_s(size, ranks=ranks, num_replicas=num_replicas)
        for first, second, size in self.ties:
            uses = {bisect.bisect_right(boundaries, layer) - 1 for layer in (first, second)}
            holders = sorted({rank for stage in uses for rank in held_by[stage]})
            for stage in uses if len(holders) > 1 else ():
                reduce_s[stage] += self._exchange_s(size, ranks=holders, num_replicas=1)
        cuts = [self.output_bytes[first - 1] for first in boundaries[1:] if self.output_bytes]
        largest = max(cuts, default=0.0)

        def stages(figures: tuple[float, ...], *, extra: float = 0.0) -> tuple[float, ...]:
            return tuple(total + extra for total in self.per_stage(figures, boundaries))

        return CostTable(
            forward_s=stages(self.forward_s, extra=self.action_s),
            input_s=stages(self.input_s, extra=self.action_s),
            # A weight gradient that is computed in I has no action of its own.
            weight_s=stages(self.weight_s, extra=self.action_s if any(self.weight_s) else 0.0),
            prepare_s=tuple(
                again + self.action_s if again else 0.0 for again in stages(self.prepare_s)
            )
            if self.recomputes
            else (),
            rank_factor=self.rank_factor,
            latency_s=self.latency_s if placement.num_ranks > 1 else 0.0,
            transfer_s=_route_s(largest, self.bytes_per_s),
            host_of=self.host_of,
            inter_host_latency_s=self.inter_host_latency_s,
            inter_host_transfer_s=_route_s(largest, self.inter_host_bytes_per_s),
            reduce_s=tuple(reduce_s) if any(reduce_s) else (),
            update_s=stages(self.update_s) if self.update_s else (),
            message_s=self.message_s + _route_s(largest, self.message_bytes_per_s),
            late_s=self._late_s(boundaries, held_by=held_by, num_replicas=num_replicas),
            agree_s=self.agree_s if placement.num_ranks * num_replicas > 1 else 0.0,
            host_s=tuple(
                stages(figures)
                for figures in (self.host_forward_s, self.host_input_s, self.host_weight_s)
            )
            if self.host_cores is not None
            else (),
            # The replicas of the pipeline work at the same time.
            host_cores=None
            if self.host_cores is None
            else max(1, self.host_cores // num_replicas),
            background=(self.background_processes + self.background_threads) / num_replicas,
        )

    def per_stage(
        self, figures: Sequence[float], boundaries: Sequence[int]
    ) -> tuple[float, ...]:
        """Sums of per-layer figures over the layers of each stage.

        Args:
            figures: one for each layer; an empty one counts as zeros.
            boundaries: index of the first layer of each stage.
        """
        edges = (*boundaries, self.num_layers)
        return tuple(float(sum(figures[start:end])) for start, end in itertools.pairwise(edges))

    def rank_state_bytes(
        self, boundaries: Sequence[int], *, placement: Placement
    ) -> tuple[float, ...]:
        """Bytes of parameters, gradients and moments on each rank, all its copies together.

        Args:
            boundaries: index of the first layer of each stage.
            placement: stages on ranks.
        """
        stages = self.per_stage(self.state_bytes, boundaries)
        return tuple(
            sum(stages[stage] for stage in placement.stages_of(rank))
            for rank in range(placement.num_ranks)
        )

    def scaled(self, factor: float, *, source: str) -> LayerCosts:
        """The same layers on devices that take `factor` times as long to compute.

        Args:
            factor: multiplies the seconds of every op and update.
            source: where the figures are from now.
        """
        seconds = ("forward_s", "input_s", "weight_s", "prepare_s", "update_s", "warm_up_s")
        changed: dict[str, Any] = {
            name: tuple(time * factor for time in getattr(self, name)) for name in seconds
        }
        return replace(self, **changed, source=source)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LayerCosts:
        """From what `to_json` gave."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        values["ties"] = tuple(map(tuple, fields.get("ties", ())))
        return cls(**values)

    def _exchange_s(
        self, num_bytes: float, *, ranks: Sequence[int], num_replicas: int
    ) -> float:
        """Time for each copy of a stage to hear from every other one: what both ends of the messages do for
        it included."""
        others = len(ranks) * num_replicas - 1
        if not others:
            return 0.0
        hosts = {self.host_of[rank] for rank in ranks} if self.host_of else set()
        if len(hosts) > 1 or (hosts and num_replicas > 1):
            rate, latency_s = self.inter_host_bytes_per_s, self.inter_host_latency_s
        else:
            rate, latency_s = self.bytes_per_s, self.latency_s
        end_s = self.message_s + _route_s(num_bytes, self.message_bytes_per_s)
        return others * (_route_s(num_bytes, rate) + 2 * end_s) + latency_s

    def _late_s(
        self,
        boundaries: Sequence[int],
        *,
        held_by: Sequence[Sequence[int]],
        num_replicas: int,
    ) -> float:
        """What routers counted is summed when all gradients are, all stages side by side: a few integers for
        each expert, no bytes to speak of."""
        counted = {bisect.bisect_right(boundaries, layer) - 1 for layer in self.counted}
        sums_s = (
            self._exchange_s(0.0, ranks=held_by[stage], num_replicas=num_replicas)
            for stage in counted
        )
        return max(sums_s, default=0.0)

    def _check_cut(self, boundaries: Sequence[int], placement: Placement) -> None:
        edges = (*boundaries, self.num_layers)
        if edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise PlanError(
                f"stage boundaries {list(boundaries)} do not cut {self.num_layers} layers into "
                "non-empty stages",
                remedy="start with 0, ascend strictly, and stay below the number of layers",
            )
        if len(boundaries) != placement.num_stages:
            raise PlanError(
                f"{len(boundaries)} stages were cut, the placement has {placement.num_stages}"
            )
        for name in _PER_RANK:
            if len(getattr(self, name)) not in (0, placement.num_ranks):
                raise PlanError(
                    f"the costs name {len(getattr(self, name))} ranks in {name}, the placement "
                    f"has {placement.num_ranks}",
                    remedy=f"give one figure for each of {placement.num_ranks} ranks, or none",
                )


def _route_s(num_bytes: float, bytes_per_s: float | None) -> float:
    return 0.0 if bytes_per_s is None else num_bytes / bytes_per_s
