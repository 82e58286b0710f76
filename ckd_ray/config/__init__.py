"""The configuration: one typed tree, read from YAML and `--set`."""

from ckd_ray.config.load import ConfigError, Problem, read_config
from ckd_ray.config.schema import (
    CollectionConfig,
    CompareConfig,
    Config,
    CrossEncoderConfig,
    DistillConfig,
    EmbedConfig,
    EvaluateConfig,
    LabelConfig,
    ModelConfig,
    RetrieveConfig,
    TeacherConfig,
)

__all__ = [
    "CollectionConfig",
    "CompareConfig",
    "Config",
    "ConfigError",
    "CrossEncoderConfig",
    "DistillConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "LabelConfig",
    "ModelConfig",
    "Problem",
    "RetrieveConfig",
    "TeacherConfig",
    "read_config",
]
