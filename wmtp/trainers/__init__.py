"""The three algorithms as trainers, by name in `wmtp.registry.trainer_registry`."""

from wmtp.trainers.base import BaseWmtpTrainer
from wmtp.trainers.baseline import MtpBaselineTrainer
from wmtp.trainers.config import ConfigError, TrainConfig
from wmtp.trainers.critic import CriticWmtpTrainer
from wmtp.trainers.errors import RunError
from wmtp.trainers.find import find_trainer
from wmtp.trainers.hook import WeightsError
from wmtp.trainers.rho1 import Rho1WmtpTrainer
from wmtp.trainers.run_folder import RunFolder
from wmtp.trainers.step import NonFiniteError

__all__ = [
    "BaseWmtpTrainer",
    "ConfigError",
    "CriticWmtpTrainer",
    "MtpBaselineTrainer",
    "NonFiniteError",
    "Rho1WmtpTrainer",
    "RunError",
    "RunFolder",
    "TrainConfig",
    "WeightsError",
    "find_trainer",
]
