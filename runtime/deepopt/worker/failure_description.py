"""What the head should know of an error in a worker: whose it is, where, and what to do about it."""

from __future__ import annotations

import os
import socket
import traceback

import torch

from deepopt.errors import DeepoptError, TransportError
from deepopt.worker.device import is_device_lost
from deepopt.worker.messages import Failure, Heartbeat, Standing


def describe_failure(
    error: BaseException, *, beat: Heartbeat, is_set_up: bool, standing: Standing | None
) -> Failure:
    """Describe an error that a worker's set-up or training raised.

    Args:
        error: a broken connection is a peer's, a lost device the device's; all others are the
            worker's own.
        beat: where the worker is.
        is_set_up: whether training had begun.
        standing: what the worker can go on with after an error of a peer.
    """
    own = "error" if is_set_up else "setup"
    kind = own
    if isinstance(error, TransportError):
        kind = "peer"
    elif is_device_lost(error):
        kind = "device"
    remedy = ""
    if isinstance(error, DeepoptError):
        message, remedy, exit_code = error.message, error.remedy, error.exit_code
    else:
        message, exit_code = f"{type(error).__name__}: {error}", 5
        if _is_out_of_memory(error):
            remedy = (
                "set pipeline.recompute to full, lower training.microbatch_size, "
                "or use more workers"
            )
    return Failure(
        sender=beat.sender,
        kind=kind,
        step=beat.step if is_set_up else 0,
        action=beat.action,
        message=message,
        traceback="".join(traceback.format_exception(error)),
        exit_code=exit_code,
        remedy=remedy,
        pid=os.getpid(),
        host=socket.gethostname(),
        standing=standing,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    # torch has a class for it on GPUs alone; its allocator on CPUs raises a RuntimeError with these words.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)
