"""The exchange of a step, told to those whom a fault kept from hearing it.

Each worker knows the rows of its last update. When its group has ended, it puts them where the
others can find them: whoever has whole gradients and no rows makes the same update from them.
"""

from __future__ import annotations

import json
from datetime import timedelta

from deepopt.errors import TransportError
from deepopt.pipeline.step_result import Agreement
from deepopt.pipeline.transport import Store


def tell(store: Store, agreement: Agreement) -> None:
    """Put an exchange where others find it; all who do so put the same.

    Args:
        store: of the generation that has ended.
        agreement: of a step that this worker has made.

    Raises:
        TransportError: the store does not answer.
    """
    try:
        store.set(_key(agreement.step), json.dumps(agreement.rows))
    except RuntimeError as error:
        raise TransportError(
            f"telling the exchange of step {agreement.step}: {error}"
        ) from error


def look_up(store: Store, step: int, *, timeout_s: float) -> Agreement:
    """The exchange of a step.

    Args:
        store: of the generation that has ended.
        step: which.
        timeout_s: longest wait, in seconds.

    Raises:
        TransportError: nobody told it in time.
    """
    try:
        store.wait([_key(step)], timedelta(seconds=timeout_s))
        rows = json.loads(store.get(_key(step)))
    except RuntimeError as error:
        raise TransportError(f"nobody told the exchange of step {step}: {error}") from error
    return Agreement(step=step, rows=tuple(map(tuple, rows)))


def _key(step: int) -> str:
    return f"exchange/{step}"
