"""Tokens a second of deepopt's searched, 1F1B and mirror pipelines against torch.distributed.pipelining.

Same model, initial values, batches, micro-batches, optimizer, clipping and threads on all
sides; the losses of the first steps must agree. deepopt runs by `deepopt launch`, the peer by
`torchrun`; a step ends with its update. The model has two blocks for each worker, so that every
placement shares it out evenly, and untied embeddings, because the peer has no tied weights
across ranks, and routes with plain top-k: the peer would never update the biases of ELB. Nobody writes
checkpoints or TensorBoard files. On fewer cores than workers
bubbles cost little: then this compares work more than waiting.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _contenders import (
    deepopt,
    measure_slices,
    parse_slices,
    pipelining,
    say_job,
    slice_table,
)
from _machine import describe
from _processes import end_cleanly_on_signals
from _report import ratio_line, say

from deepopt.config import JobConfig
from deepopt.job_file import dump_job, load_job

AIM = 1.00
WORKERS = 4
OURS = {
    "deepopt auto": (),  # the default: a searched order, its costs measured at launch
    "deepopt 1f1b": ("pipeline.placement=line", "pipeline.schedule=1f1b"),
    "deepopt mirror": ("pipeline.placement=mirror", "pipeline.schedule=bi_stream"),
}
PEERS = {"torch Schedule1F1B": "1f1b", "torch ScheduleDualPipeV": "dual_pipe_v"}


def main() -> None:
    """Run all contenders in turns and print the table and the ratio."""
    options = parse_slices(__doc__)
    end_cleanly_on_signals()
    say("\n".join(describe()))
    job = make_job(quick=options.quick)
    say_job(job, workers=WORKERS, options=options)
    with tempfile.TemporaryDirectory(prefix="deepopt-bench-") as folder:
        job_file = Path(folder) / "job.yaml"
        job_file.write_text(dump_job(job))
        ours = {
            name: deepopt(job_file, workers=WORKERS, settings=settings)
            for name, settings in OURS.items()
        }
        peers = {
            name: pipelining(job_file, workers=WORKERS, schedule=schedule)
            for name, schedule in PEERS.items()
        }
        measured = measure_slices(ours | peers, job=job, options=options)
    say("\n" + slice_table(measured, job=job) + "\n")
    rates = {name: one.steps / one.wall_s for name, one in measured.items()}
    best, best_peer = max(OURS, key=rates.__getitem__), max(PEERS, key=rates.__getitem__)
    say(f"{best} against {best_peer}")
    say(ratio_line(rates[best] / rates[best_peer], aim=AIM))


def make_job(*, quick: bool) -> JobConfig:
    """The job of all contenders.

    Args:
        quick: small and short.
    """
    size = ", d_model: 64, expert_hidden: 32" if quick else ""
    settings = [
        f"model.kwargs={{num_blocks: {2 * WORKERS}, tie_embeddings: false{size}}}",
        f"training.microbatches={2 * WORKERS}",  # the least that DualPipeV takes
        "elb.mode=none",
        "checkpoint.every=0",
        "logging.tensorboard=false",
    ]
    return load_job(None, settings)


if __name__ == "__main__":
    main()
