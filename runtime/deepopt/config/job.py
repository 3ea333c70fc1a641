"""The whole job: its sections, each with defaults that train at once."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from deepopt.config.elb import ElbConfig
from deepopt.config.emulation import EmulationConfig
from deepopt.config.faults import FaultsConfig
from deepopt.config.model_and_data import DataConfig, EvaluationConfig, ModelConfig
from deepopt.config.output import CheckpointConfig, LoggingConfig
from deepopt.config.pipeline import ParallelConfig, PipelineConfig
from deepopt.config.processes import ClusterConfig, WorkerConfig
from deepopt.config.training import OptimizerConfig, PrecisionConfig, TrainingConfig
from deepopt.config_fields import Section


def _defaults_of(section: type[Section]) -> Any:
    return Field(default_factory=section, description=section.__doc__)


class JobConfig(Section):
    """One job: everything that decides what is trained, where, and how."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        default="deepopt", description="Name of the job: letters, digits, `.`, `_` and `-`."
    )
    model: ModelConfig = _defaults_of(ModelConfig)
    data: DataConfig = _defaults_of(DataConfig)
    training: TrainingConfig = _defaults_of(TrainingConfig)
    optimizer: OptimizerConfig = _defaults_of(OptimizerConfig)
    pipeline: PipelineConfig = _defaults_of(PipelineConfig)
    elb: ElbConfig = _defaults_of(ElbConfig)
    parallel: ParallelConfig = _defaults_of(ParallelConfig)
    evaluation: EvaluationConfig = _defaults_of(EvaluationConfig)
    precision: PrecisionConfig = _defaults_of(PrecisionConfig)
    checkpoint: CheckpointConfig = _defaults_of(CheckpointConfig)
    logging: LoggingConfig = _defaults_of(LoggingConfig)
    worker: WorkerConfig = _defaults_of(WorkerConfig)
    emulation: EmulationConfig = _defaults_of(EmulationConfig)
    cluster: ClusterConfig = _defaults_of(ClusterConfig)
    faults: FaultsConfig = _defaults_of(FaultsConfig)
