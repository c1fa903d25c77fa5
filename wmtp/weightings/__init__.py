"""Rules that say how much each pair of a token and a head counts: one rule, one file."""

from wmtp.weightings.base import Weighting
from wmtp.weightings.critic import Critic
from wmtp.weightings.excess import Excess
from wmtp.weightings.given import Given
from wmtp.weightings.uniform import Uniform

__all__ = ["Critic", "Excess", "Given", "Uniform", "Weighting"]
