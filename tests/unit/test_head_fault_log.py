"""What the report of a fault keeps."""

from __future__ import annotations

from deepopt.head.fault_log import VICTIMS_SHOWN, FaultRecord
from deepopt.head.recovery import Blame
from deepopt.worker.messages import Failure, Sender


def failure(rank: int, *, kind: str) -> Failure:
    sender = Sender(job_id="j", generation=1, plan_id=1, rank=rank, incarnation=str(rank))
    return Failure(sender=sender, kind=kind, step=3, action="", message=kind)


def test_of_a_thousand_victims_some_are_shown_and_all_are_counted() -> None:
    record = FaultRecord(number=1, generation=1, step_done=2, since_s=0.0, noticed_s=0.0)
    record.blame = Blame(
        culprit=failure(0, kind="death"),
        victims=tuple(failure(rank, kind="peer") for rank in range(1, 1024)),
    )
    told = record.to_json(None)
    assert [victim["rank"] for victim in told["victims"]] == [*range(1, VICTIMS_SHOWN + 1)]
    assert told["num_victims"] == 1023
