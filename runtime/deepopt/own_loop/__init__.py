"""`BiStreamPipeline`: the bi-stream pipeline for loops that somebody else writes."""

from __future__ import annotations

from deepopt.own_loop.bi_stream_pipeline import BiStreamPipeline

__all__ = ["BiStreamPipeline"]
