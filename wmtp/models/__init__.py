"""The models that the trainers train: a multi-token-prediction transformer and a value head."""

from wmtp.models.transformer import MTPConfig, MTPOutput, MTPTransformer
from wmtp.models.value_head import ValueHead

__all__ = ["MTPConfig", "MTPOutput", "MTPTransformer", "ValueHead"]
