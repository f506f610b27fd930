"""The configuration: the tree, its command line, its files, and its derived values. Needs neither torch nor numpy."""

from megallm.config.arguments import build_parser, parse_arguments
from megallm.config.dictionary import difference, difference_yaml, from_dict, to_dict, to_yaml
from megallm.config.report import fail, numbered, stop
from megallm.config.resolve import data_parallel_size, resolve
from megallm.config.tree import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PlanConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanConfig",
    "TrainingConfig",
    "build_parser",
    "data_parallel_size",
    "difference",
    "difference_yaml",
    "fail",
    "from_dict",
    "numbered",
    "parse_arguments",
    "resolve",
    "stop",
    "to_dict",
    "to_yaml",
]
