"""What an algorithm's own code gives the trainer: weights that fit, or an error that is its."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from wmtp.checks import raise_on_bad_weight
from wmtp.kinds import check_same_device
from wmtp.labels import Targets
from wmtp.trainers.step import TRAIN, as_weighting
from wmtp.weightings import Given, Weighting


class WeightsError(TypeError, ValueError):
    """What `compute_head_weights` returned is no weighting of this batch."""


@contextlib.contextmanager
def own_code(algo: str, step: int) -> Iterator[None]:
    """Whatever `compute_head_weights` raises in the block is said to be the algorithm's.

    Raises:
        WeightsError: it left the process, for which a run would pass as finished.
    """
    try:
        yield
    except SystemExit as error:
        raise WeightsError(
            f"step {step}, {algo}: its compute_head_weights called sys.exit({error.code!r}): "
            "raise an error instead"
        ) from error
    except Exception as error:
        error.add_note(f"step {step}: raised in the compute_head_weights of {algo}, not by wmtp")
        raise


def checked_weighting(
    returned: Any, trainer: str, states: Tensor, targets: Targets, where: str
) -> Weighting:
    """What `compute_head_weights` returned, as a rule that fits the batch, resolved.

    Args:
        returned: by it.
        trainer: the name of its class.
        states: [B, S, H, D], of the model.
        targets: of the batch.
        where: the step and the algorithm, for the message.

    Raises:
        WeightsError: it is none, or does not fit.
    """
    try:
        weighting = as_weighting(returned, trainer)
        weighting.check("the model's states", states, targets)
        check_same_device("the model", states, **vars(weighting))
        weighting = weighting.resolved(weighting.narrowed(targets))
        if isinstance(weighting, Given):
            raise_on_bad_weight(weighting.head_weights.detach().float(), targets.valid)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{where}: {error}") from error
    return weighting


def what_weighs_nothing(record: dict[str, Any], algo: str) -> str | None:
    """Why a step that had targets has learned nothing."""
    if record["stage"] != TRAIN or record["loss"] or not record["targets"]:
        return None
    return (
        f"all weights of {algo} are 0 in a step, or too small to count: its loss is 0 and nothing "
        "was learned from it; look at its compute_head_weights"
    )
