"""The job: what a user may ask for, as frozen pydantic models with defaults that train at once.

A module holds one section of the job file, or a few that belong together; `job` puts them together.
Each field's description (with its unit) is the source of the JSON Schema, of the reference in
`docs/job-file.md` and of the file that `deepopt init` writes. What this package does not do:
read files and word errors (`deepopt.job_file` does), resolve `auto` (the planner does), import
what an import path names (`deepopt.import_path` does).
"""

from __future__ import annotations

from deepopt.config.elb import ElbConfig
from deepopt.config.emulation import EmulationConfig
from deepopt.config.faults import FaultsConfig
from deepopt.config.job import JobConfig
from deepopt.config.model_and_data import DataConfig, EvaluationConfig, ModelConfig
from deepopt.config.output import CheckpointConfig, LoggingConfig
from deepopt.config.pipeline import BUILT_AXES, LATER_AXES, ParallelConfig, PipelineConfig
from deepopt.config.processes import ClusterConfig, WorkerConfig
from deepopt.config.training import OptimizerConfig, PrecisionConfig, TrainingConfig

__all__ = [
    "BUILT_AXES",
    "LATER_AXES",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "ElbConfig",
    "EmulationConfig",
    "EvaluationConfig",
    "FaultsConfig",
    "JobConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PipelineConfig",
    "PrecisionConfig",
    "TrainingConfig",
    "WorkerConfig",
]
