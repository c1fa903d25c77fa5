import pytest

import wmtp.scorers
import wmtp.trainers
from wmtp.registry import Registry, scorer_registry, trainer_registry


def test_the_library_registers_its_algorithms_and_scorers():
    assert trainer_registry.names() == ["mtp-baseline", "critic-wmtp", "rho1-wmtp"]
    assert trainer_registry.get("rho1-wmtp") is wmtp.trainers.Rho1WmtpTrainer
    assert scorer_registry.get("critic-wmtp") is wmtp.scorers.CriticScorer
    entry = trainer_registry.entry("rho1-wmtp")
    assert (entry.category, entry.version) == ("trainer", "2.0.0")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match=r"no trainer .* 'rho2'.*'mtp-baseline'.*'rho1-wmtp'"):
        trainer_registry.get("rho2")
    with pytest.raises(KeyError, match="known are none"):
        Registry("thing").get("x")


def test_a_name_is_taken_once():
    registry = Registry("thing")
    registry.register("a", category="x", version="1")(int)
    with pytest.raises(ValueError, match=r"thing 'a' is already registered \(by int\)"):
        registry.register("a", category="x", version="1")(str)
    assert registry.get("a") is int


def test_names_of_one_category():
    registry = Registry("thing")
    registry.register("b", category="x", version="1")(int)
    registry.register("a", category="y", version="1")(str)
    assert registry.names() == ["b", "a"]
    assert registry.names(category="y") == ["a"]
