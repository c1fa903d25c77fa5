"""Scorers: from what a model and its reference or critic say to one weight per token and head."""

from wmtp.scorers.critic import CriticInputs, CriticScorer, CriticScores
from wmtp.scorers.rho1 import Rho1ExcessScorer, Rho1Inputs, Rho1Scores

__all__ = [
    "CriticInputs",
    "CriticScorer",
    "CriticScores",
    "Rho1ExcessScorer",
    "Rho1Inputs",
    "Rho1Scores",
]
