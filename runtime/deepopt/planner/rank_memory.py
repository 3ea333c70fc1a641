"""What each pipeline rank holds at its peak. Pure."""

from __future__ import annotations

from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.plan import Plan
from deepopt.planner.shapes import sizes_of
from deepopt.schedule.ir import Schedule
from deepopt.schedule.memory import peaks


def rank_bytes(costs: LayerCosts, plan: Plan, schedule: Schedule) -> tuple[float, ...]:
    """States, and activations of micro-batches in flight, of each rank.

    Args:
        costs: of the layers.
        plan: who holds them.
        schedule: in which order they work.
    """
    placement = plan.make_placement()
    states = costs.rank_state_bytes(plan.boundaries, placement=placement)
    if not any(costs.activation_bytes):
        return states
    memory = sizes_of(
        costs, boundaries=plan.boundaries, caps=(float("inf"),) * placement.num_ranks
    )
    return tuple(map(sum, zip(peaks(schedule, memory), states, strict=True)))
