"""What both backends share: configuration, named cases, tolerances and the float64 oracle.

Needs NumPy and PyYAML only.
"""

from vq_common.config import BenchConfig, TrainConfig, TransformerConfig, load_config

__all__ = ["BenchConfig", "TrainConfig", "TransformerConfig", "load_config"]
