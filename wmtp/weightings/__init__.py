"""Rules that say how much each pair of a token and a head counts: one rule, one file."""

from wmtp.weightings.base import Weighting
from wmtp.weightings.critic import Critic
from wmtp.weightings.decay import Decay
from wmtp.weightings.dft import DFT
from wmtp.weightings.dpace import DPace
from wmtp.weightings.entropy_gate import EntropyGate
from wmtp.weightings.excess import Excess
from wmtp.weightings.focal import Focal
from wmtp.weightings.given import Given
from wmtp.weightings.keep_top import KeepTop
from wmtp.weightings.product import Product
from wmtp.weightings.uniform import Uniform

__all__ = [
    "DFT",
    "Critic",
    "DPace",
    "Decay",
    "EntropyGate",
    "Excess",
    "Focal",
    "Given",
    "KeepTop",
    "Product",
    "Uniform",
    "Weighting",
]
