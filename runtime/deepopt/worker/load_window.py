"""Expert loads of steps gathered into windows, so that a long run does not drown its head in them."""

from __future__ import annotations

from dataclasses import dataclass

Loads = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Loads of some steps together.

    Args:
        first_step: of the window.
        step: its last.
        loads: (layer, tokens of each expert) of each router.
    """

    first_step: int
    step: int
    loads: Loads


class LoadWindow:
    """Adds steps up; the first `length` steps of a job are windows of their own.

    Args:
        length: steps of a window.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._first_step: int | None = None
        self._loads: Loads = ()

    def add(self, step: int, loads: Loads) -> Window | None:
        """Take a step's loads.

        Args:
            step: 1-based; one after the last, or anywhere after a restart.
            loads: of the step; empty without experts.

        Returns:
            The window, when the step ends one.
        """
        if not loads:
            return None
        if self._first_step is None:
            self._first_step, self._loads = step, loads
        else:
            self._loads = tuple(
                (layer, tuple(a + b for a, b in zip(before, now, strict=True)))
                for (layer, before), (_, now) in zip(self._loads, loads, strict=True)
            )
        if step > self._length and step % self._length:
            return None
        window = Window(first_step=self._first_step, step=step, loads=self._loads)
        self._first_step = None
        return window
