"""A device that is not there: every operation is computed for real, and ends when the table says.

`EmulatedDevice` takes the place of the recorder of spans, because it stands at the start and the
end of every action already: an action that is done early waits for its end. `EmulatedOptimizer`
does the same for the update. What takes longer than the table says is counted, never hidden.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import torch

from deepopt.config import OptimizerConfig
from deepopt.pipeline.emulated_clock import Overruns, sharpen_timer, wait_until
from deepopt.pipeline.optimizer import AdamWOptimizer
from deepopt.pipeline.spans import SpanRecorder
from deepopt.pipeline.stage import Layer
from deepopt.schedule.ir import COMPUTE_OPS, Action, Op
from deepopt.schedule.simulate import CostTable


def action_times_s(
    program: Sequence[Action], *, costs: CostTable, rank: int
) -> dict[Action, float]:
    """How long a rank's device takes for each compute action.

    A backward whose forward is to be repeated, and for which no R stands in the program, repeats
    it itself and takes that much longer.

    Args:
        program: of the rank.
        costs: of the stages.
        rank: its pipeline rank.
    """
    factor = costs.rank_factor[rank] if costs.rank_factor else 1.0
    prepared = {(a.stage, a.microbatch) for a in program if a.op is Op.R}
    times_s = {}
    for action in program:
        if action.op not in COMPUTE_OPS:
            continue
        time_s = costs.duration_s(action.stage, op=action.op)
        if action.op in (Op.I, Op.B) and (action.stage, action.microbatch) not in prepared:
            time_s += costs.duration_s(action.stage, op=Op.R)
        times_s[action] = time_s * factor
    return times_s


class EmulatedDevice(SpanRecorder):
    """Records spans, and makes each compute action last as long as the table says.

    Args:
        times_s: seconds of each compute action.
    """

    def __init__(self, times_s: Mapping[Action, float]) -> None:
        super().__init__(torch.device("cpu"))
        self.overruns = Overruns()
        self._times_ns = {action: round(time_s * 1e9) for action, time_s in times_s.items()}
        self._began_ns = 0
        self._thread: int | None = None  # whose timer is sharp: training may change threads

    def begin(self) -> None:
        """An action starts."""
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            sharpen_timer()
        self._began_ns = time.monotonic_ns()

    def end(self, action: Action) -> None:
        """The work of the action that began last is done: wait for its end on the device."""
        busy_ns = self._times_ns.get(action, 0)
        if action.op in COMPUTE_OPS:
            self.finish(self._began_ns, busy_ns)
        self._raw.append((action, self._began_ns, time.monotonic_ns(), busy_ns))

    def finish(self, began_ns: int, busy_ns: int) -> None:
        """Wait until an operation has lasted long enough, and count it.

        Args:
            began_ns: its start, of `time.monotonic_ns`.
            busy_ns: how long the device takes.
        """
        late_ns = time.monotonic_ns() - began_ns - busy_ns
        self.overruns.num_operations += 1
        if late_ns > 0:
            self.overruns.num_overran += 1
            self.overruns.late_s += late_ns * 1e-9
        wait_until(began_ns + busy_ns)


class EmulatedOptimizer(AdamWOptimizer):
    """The update of a layer, which takes as long as the table says.

    Args:
        layer: as for `AdamWOptimizer`.
        config: as for `AdamWOptimizer`.
        device: that it keeps busy.
        update_s: seconds of an update.
    """

    def __init__(
        self, layer: Layer, config: OptimizerConfig, *, device: EmulatedDevice, update_s: float
    ) -> None:
        super().__init__(layer, config)
        self._emulated = device
        self._update_ns = round(update_s * 1e9)

    def step(self, grads: Mapping[str, torch.Tensor], learning_rate: float) -> None:
        """Update the layer."""
        began_ns = time.monotonic_ns()
        super().step(grads, learning_rate)
        self._emulated.finish(began_ns, self._update_ns)
