import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp import td_head_weights
from wmtp.labels import shift_to_heads
from wmtp.models import ValueHead
from wmtp.scorers import CriticScorer, Rho1ExcessScorer

IGNORE = -100


def random_scores(seed: int, batch: int, length: int, heads: int):
    generator = torch.Generator().manual_seed(seed)
    base_ce = torch.rand(batch, length, heads, generator=generator) * 8
    ref_ce = torch.rand(batch, length - 1, generator=generator) * 8
    target_ids = torch.randint(0, 9, (batch, length), generator=generator)
    target_ids[torch.rand(batch, length, generator=generator) < 0.2] = IGNORE
    return base_ce, ref_ce, target_ids


def test_excess_compares_head_k_with_the_reference_about_the_same_token():
    # ref_ce[t] = 10 (t + 1) is about token t + 1: head k at t must meet 10 (t + k + 1).
    ref_ce = torch.tensor([[10.0, 20.0, 30.0]])
    scorer = Rho1ExcessScorer(config={"excess": "signed"})
    inputs = {"base_ce": torch.zeros(1, 4, 2), "ref_ce": ref_ce}
    expected = [[[-10, -20], [-20, -30], [-30, 0], [0, 0]]]
    assert scorer.compute_excess_loss(**inputs).tolist() == expected
    assert scorer.run({**inputs, "target_ids": torch.tensor([[7, 7, 7, 7]])})[
        "excess"
    ].tolist() == (expected)


def test_an_aligned_reference_is_compared_head_by_head():
    """As the scorer is asked without target_ids: softmax over all heads."""
    base_ce, ref_ce = torch.rand(2, 5, 3) * 4, torch.rand(2, 5, 3) * 4
    scores = Rho1ExcessScorer(config={"temperature": 0.7}).run(
        {"base_ce": base_ce, "ref_ce": ref_ce}
    )
    excess = (base_ce - ref_ce).abs()
    torch.testing.assert_close(scores["excess"], excess)
    torch.testing.assert_close(scores["weights"], (excess / 0.7).softmax(-1))


def test_without_targets_heads_within_the_sequence_count():
    base_ce, ref_ce, _ = random_scores(0, 2, 5, 3)
    scorer, every = Rho1ExcessScorer(), torch.ones(2, 5, dtype=torch.long)
    inputs = {"base_ce": base_ce, "ref_ce": ref_ce}
    found, wanted = scorer.run(inputs), scorer.run({**inputs, "target_ids": every})
    for name in ("weights", "excess"):
        assert torch.equal(found[name], wanted[name])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temprature": 1.0}, r"no setting 'temprature': known are temperature, excess, ignore"),
        ({"temperature": 0.0}, r"temperature must be"),
        ({"excess": "sign"}, r"excess must be"),
    ],
)
def test_settings_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        Rho1ExcessScorer(config)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"ref_ce must be \[B, T-1\] = \(1, 3\), got \(1, 2\)"):
        Rho1ExcessScorer().run({"base_ce": torch.zeros(1, 4, 2), "ref_ce": torch.zeros(1, 2)})


@pytest.mark.parametrize("excess", ["abs", "signed"])
@given(seed=st.integers(0, 2**20), length=st.integers(2, 7), heads=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_weights_are_the_softmax_of_the_excess_over_valid_heads(excess, seed, length, heads):
    base_ce, ref_ce, target_ids = random_scores(seed, 2, length, heads)
    scores = Rho1ExcessScorer({"temperature": 0.5, "excess": excess}).run(
        {"base_ce": base_ce, "ref_ce": ref_ce, "target_ids": target_ids}
    )
    valid = shift_to_heads(target_ids, heads, IGNORE) != IGNORE
    exponentials = torch.where(valid, (scores["excess"].double() / 0.5).exp(), 0.0)
    expected = exponentials / exponentials.sum(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(scores["weights"].double(), expected, rtol=1e-5, atol=1e-7)
    assert (scores["excess"][~valid] == 0).all()


def test_rho1_scores_carry_no_gradient():
    base_ce, ref_ce, target_ids = random_scores(0, 2, 5, 3)
    scores = Rho1ExcessScorer().run(
        {
            "base_ce": base_ce.requires_grad_(),
            "ref_ce": ref_ce.requires_grad_(),
            "target_ids": target_ids,
        }
    )
    assert not scores["weights"].requires_grad
    assert not scores["excess"].requires_grad


def test_critic_weights_are_those_of_its_values_and_constants():
    torch.manual_seed(0)
    value_head = ValueHead(8)
    hidden = torch.randn(2, 6, 8, requires_grad=True)
    target_ids = torch.randint(0, 5, (2, 6))
    scores = CriticScorer(
        {"horizon": 3, "discount": 0.9, "temperature": 0.4}, value_head=value_head
    ).run({"hidden_states": hidden, "target_ids": target_ids})
    torch.testing.assert_close(scores["values"], value_head(hidden).detach())
    expected = td_head_weights(scores["values"], target_ids, 3, 0.9, 0.4)
    torch.testing.assert_close(scores["weights"], expected, rtol=0, atol=0)
    assert not scores["weights"].requires_grad
    assert not scores["values"].requires_grad
