"""The code in the documents runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore:Likely has no twin")
def test_a_rule_of_your_own_as_contributing_has_it():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 25
    names = {"__name__": "of_a_document"}
    exec(code, names)
    # Five tokens, all as likely: three pairs of log 5 nats, each of weight 1/5.
    assert names["loss"].item() == pytest.approx(3 * 1.6094 / 5, rel=1e-4)
