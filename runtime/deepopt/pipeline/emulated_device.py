"""A device that is not there: every operation is computed for real, and ends when the table says.

`EmulatedDevice` takes the place of the recorder of spans, because it stands at the start and the
end of every action already: an action that is done early waits for its end. So do the updates of layers;
`EmulatedOptimizer` says which were made. What takes longer than the table says is counted, never hidden.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
        self._update_ns = 0  # of the layers that were updated in the updates in work
        self._done_ns = 0  # of the next updates, before they begin
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
            self._finish(self._began_ns, busy_ns)
        self._raw.append((action, self._began_ns, time.monotonic_ns(), busy_ns))

    @contextmanager
    def updates(self) -> Iterator[None]:
        """What is done inside lasts as long as the layers updated in it take together.

        The routers' biases are part of it, and so is what was done inside `before_updates`: the stated time
        stands for all that a device does once a step, as a profile counts it. Where no layer's
        update has a stated time it lasts as long as it takes.
        """
        began_ns = time.monotonic_ns() - self._done_ns
        self._update_ns = self._done_ns = 0
        yield
        if self._update_ns:
            self._finish(began_ns, self._update_ns)

    @contextmanager
    def before_updates(self) -> Iterator[None]:
        """What is done inside is part of the next updates: norms, and what routers counted."""
        began_ns = time.monotonic_ns()
        yield
        self._done_ns += time.monotonic_ns() - began_ns

    def take_update(self, busy_ns: int) -> None:
        """A layer was updated, inside `updates`.

        Args:
            busy_ns: how long the device takes for it.
        """
        self._update_ns += busy_ns

    def _finish(self, began_ns: int, busy_ns: int) -> None:
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
    """The optimizer of a layer whose update takes as long as the table says.

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
        super().step(grads, learning_rate)
        self._emulated.take_update(self._update_ns)
