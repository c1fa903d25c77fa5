import ast
import functools
import inspect
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny_runs import ALGORITHMS, make_trainer, prepare, write_rewarded_corpus
from wmtp.data.batches import Rows
from wmtp.labels import Targets
from wmtp.metrics import Summary
from wmtp.models import MTPConfig, MTPTransformer
from wmtp.reference import Pairs, compute_weighted_mtp_loss, weights_of
from wmtp.registry import trainer_registry
from wmtp.trainers import ConfigError, NonFiniteError, TrainConfig
from wmtp.trainers.evaluation import evaluate, step_statistics
from wmtp.trainers.returns import gae_returns, token_mask, token_rewards

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the shape of the code ----


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_algorithm_is_at_most_30_lines_beyond_its_docstring(algo):
    cls = trainer_registry.get(algo)
    source = inspect.getsource(cls)
    (node,) = ast.parse(source).body
    docstring = node.body[0]
    assert isinstance(docstring.value.value, str)
    skipped = set(range(docstring.lineno, docstring.end_lineno + 1))
    code = [
        line
        for number, line in enumerate(source.splitlines(), start=1)
        if number not in skipped and line.strip() and not line.strip().startswith("#")
    ]
    assert len(code) <= 30


# ---- the critic's returns ----


def test_gae_by_hand():
    # gamma = 0.5, lambda = 0.5; V = 0 after the end.
    # delta = 1 + .5*4 - 2 = 1;  2 + .5*6 - 4 = 1;  3 - 6 = -3
    # A_2 = -3;  A_1 = 1 - .25*3 = .25;  A_0 = 1 + .25*.25 = 1.0625;  returns = A + V
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, 6.0]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    returns = gae_returns(rewards, values, everything, gamma=0.5, gae_lambda=0.5)
    assert returns.tolist() == [[3.0625, 4.25, 3.0]]
    # With the last position padded: delta = 1, 2 - 4 = -2;  A_1 = -2;  A_0 = 1 - .5 = .5
    mask = torch.tensor([[True, True, False]])
    assert gae_returns(rewards, values, mask, 0.5, 0.5).tolist() == [[2.5, 2.0, 0.0]]


@given(
    seed=st.integers(0, 2**20),
    length=st.integers(1, 40),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_gae_is_the_backward_recursion(seed, length, gamma, gae_lambda):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(1, length, generator=generator, dtype=torch.float64)
    values = torch.randn(1, length, generator=generator, dtype=torch.float64)
    advantage, following, expected = 0.0, 0.0, []
    for reward, value in zip(rewards[0].flip(0).tolist(), values[0].flip(0).tolist(), strict=True):
        advantage = reward + gamma * following - value + gamma * gae_lambda * advantage
        following = value
        expected.append(advantage + value)
    mask = torch.ones(1, length, dtype=torch.bool)
    returns = gae_returns(rewards, values, mask, gamma, gae_lambda)
    torch.testing.assert_close(returns[0].flip(0), torch.tensor(expected, dtype=torch.float64))


def test_mask_ends_at_the_last_counted_token():
    target_ids = torch.tensor([[-100, 5, -100, 6, -100], [1, 2, 3, 4, 5], [-100] * 5])
    assert token_mask(Targets(target_ids, 5, 2)).int().tolist() == [
        [1, 1, 1, 1, 0],
        [1] * 5,
        [0] * 5,
    ]


def test_a_sequence_reward_sits_on_its_last_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = token_rewards(torch.zeros(2, 3, 2), mask, mask, torch.tensor([5.0, -1.0]))
    assert rewards.tolist() == [[0, 5, 0], [0, 0, -1]]


def test_without_rewards_they_are_the_models_own_whitened_loss():
    ce = torch.tensor([[[1.0, 9.0], [3.0, 9.0], [0.0, 9.0]]])
    predicts = torch.tensor([[True, True, False]])
    rewards = token_rewards(ce, torch.ones(1, 3, dtype=torch.bool), predicts, None)
    torch.testing.assert_close(rewards, torch.tensor([[1.0, -1.0, 0.0]]))


# ---- configuration ----


def test_learning_rate_rises_then_falls_to_a_tenth():
    config = TrainConfig(algo="mtp-baseline", steps=100)
    factors = [config.lr_factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.2)
    assert factors[5] == max(factors) == pytest.approx(1.0)
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[100] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 2147483647, got 0"),
        ({"seq_len": 1}, "seq_len must be a whole number from 2 to 2147483647"),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 2147483647, got 2.5"),
        ({"steps": True}, "steps must be a whole number from 1 to 2147483647, got True"),
        ({"excess": "foo"}, r"excess must be one of \('abs', 'signed'\), got foo"),
        ({"reduction": "mean"}, r"reduction must be one of \('token_mean', "),
        ({"discount": 7}, "discount must be between 0 and 1, got 7"),
        ({"gamma": float("nan")}, "gamma must be between 0 and 1, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
        ({"lr": "fast"}, "lr must be positive and finite, got fast"),
        ({"attention_heads": 0}, "attention_heads must be a whole number from 1 to 2147483647"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to 4294967295, got 4294967296"),
        ({"steps": 10**400}, "steps must be a whole number from 1 to 2147483647"),
        ({"lr": 10**400}, "lr must be positive and finite"),
        ({"dim": 24}, "dim must be a multiple of 2 x attention_heads = 16, got 24"),
        ({"horizon": 600}, "horizon must be below seq_len 512, got 600"),
        ({"lr": float("nan")}, "lr must be positive and finite"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"loss": "liger"}, r"loss must be one of \('linear', 'fused', 'eager'\), got liger"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(algo="mtp-baseline", **settings)


# ---- one step ----


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_step_trains_on_the_algorithms_loss(algo, data, tmp_path):
    trainer = make_trainer(algo, data, tmp_path, value_warmup_steps=0)
    batch = data.train.batch(0, batch_size=2, rows=Rows(16), seed=0)
    with torch.no_grad():
        output = trainer.model(batch["input_ids"])
        weighting = trainer.compute_head_weights(batch, output)
        logits = trainer.model.unembed(output.head_hidden_states)
        expected = compute_weighted_mtp_loss(
            logits, batch["target_ids"], horizon=3, weighting=weighting
        )
        targets = trainer.targets(batch)
        weights = weights_of(weighting, Pairs(expected.ce_per_head, targets.valid()), targets)
    again = compute_weighted_mtp_loss(logits, batch["target_ids"], weights, 3)
    record = trainer.train_step(batch)
    assert record["step"] == trainer.step == 1
    assert record["stage"] == "train"
    assert record["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert record["loss"] == pytest.approx(again.loss.item(), rel=1e-5)
    assert sum(record[f"weight_head_{k}"] for k in range(3)) == pytest.approx(1, rel=1e-5)
    assert record["lr"] == pytest.approx(1e-2)
    assert ("value_loss" in record) == (algo == "critic-wmtp")


def test_the_warm_up_trains_the_value_head_alone(data, tmp_path):
    trainer = make_trainer("critic-wmtp", data, tmp_path)
    model = [parameter.clone() for parameter in trainer.model.parameters()]
    head = [parameter.clone() for parameter in trainer.value_head.parameters()]
    for step in range(3):
        batch = data.train.batch(step, batch_size=2, rows=Rows(16), seed=0, stream=1)
        record = trainer.train_step(batch)
        assert record["stage"] == "value_warmup"
        assert record["loss"] == record["value_loss"]
        assert record["lr"] == trainer.config.value_lr
    assert all(torch.equal(a, b) for a, b in zip(model, trainer.model.parameters(), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(head, trainer.value_head.parameters(), strict=True)
    )
    assert trainer.stage == "train"
    trainer.train_step(batch)
    assert not torch.equal(model[0], next(trainer.model.parameters()))


def test_the_value_loss_never_reaches_the_model(data, tmp_path):
    trainer = make_trainer("critic-wmtp", data, tmp_path)
    batch = data.train.batch(0, batch_size=2, rows=Rows(16), seed=0)
    output = trainer.model(batch["input_ids"])
    loss = trainer.value_loss(batch, output.hidden_states.detach(), torch.rand(2, 16, 3))
    loss.backward()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert all(parameter.grad is not None for parameter in trainer.value_head.parameters())


def test_model_step_i_sees_the_same_batch_in_every_algorithm(data, tmp_path):
    seen = {}
    for algo in ALGORITHMS:
        trainer = make_trainer(algo, data, tmp_path / algo)
        trainer.step = trainer.warmup_steps + 4
        seen[algo] = trainer._next_batch()["sequence_ids"].tolist()
        first = next(trainer.model.parameters())
        seen[algo] += first.flatten()[:5].tolist()
    assert seen["mtp-baseline"] == seen["critic-wmtp"] == seen["rho1-wmtp"]


def test_rewards_reach_the_critic(tmp_path):
    data = prepare(write_rewarded_corpus(tmp_path / "text"))
    trainer = make_trainer("critic-wmtp", data, tmp_path / "run")
    batch = trainer._next_batch()
    output = trainer.model(batch["input_ids"])
    losses = [
        trainer.value_loss(
            {**batch, "reward": reward}, output.hidden_states.detach(), torch.zeros(2, 16, 3)
        ).item()
        for reward in (torch.zeros(2), torch.full((2,), 100.0))
    ]
    assert losses[1] > 100 * losses[0]
    assert math.isfinite(trainer.train_step(batch)["loss"])


@pytest.mark.parametrize("poison", ["weights", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poison, data, tmp_path):
    trainer = make_trainer("mtp-baseline", data, tmp_path)
    batch = data.train.batch(0, batch_size=2, rows=Rows(16), seed=0)
    if poison == "weights":
        with torch.no_grad():
            trainer.model.norm.weight[0] = float("nan")
        quantity = r"loss is nan"
    else:
        trainer.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
        quantity = r"step 1: grad_norm is (inf|nan)"
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    ids = ", ".join(str(number) for number in batch["sequence_ids"].tolist())
    with pytest.raises(NonFiniteError, match=rf"step 1: .*{quantity[-10:]}.*sequences \[{ids}\]"):
        trainer.train_step(batch)
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    assert trainer.step == 0
    assert not trainer.optimizer.state


def test_bf16_keeps_the_weights_in_fp32(data, tmp_path):
    trainer = make_trainer("rho1-wmtp", data, tmp_path, precision="bf16")
    batch = data.train.batch(0, batch_size=2, rows=Rows(16), seed=0)
    assert math.isfinite(trainer.train_step(batch)["loss"])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# ---- what is measured ----


def test_statistics_of_a_step():
    ce = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]]])
    weights = torch.tensor([[[3.0, 1.0], [2.0, 0.0], [0.0, 0.0]]])  # only token 0 has both
    valid = Targets(torch.tensor([[1, 2, 3]]), 3, 2).valid()
    of_pairs = (valid, ce, ce == 2.0, ce / 2, weights)
    summary = Summary(*(values.sum((0, 1), dtype=torch.float64) for values in of_pairs))
    numbers = step_statistics(summary, weights, valid, lambda sums: sums)
    assert numbers["targets"] == 3
    assert numbers["ce_head_0"] == numbers["ce_head_1"] == 2.0
    assert numbers["accuracy_head_0"] == 0
    assert numbers["accuracy_head_1"] == 1
    assert numbers["entropy_head_0"] == 1.0
    assert numbers["weight_head_0"] == 0.75
    assert numbers["weight_head_1"] == 0.25
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert numbers["weight_entropy"] == pytest.approx(entropy)
    nothing = step_statistics(summary, torch.zeros(1, 3, 2), valid, lambda sums: sums)
    assert nothing["weight_head_0"] == nothing["weight_entropy"] == 0


def test_evaluation_is_the_mean_over_all_tokens(data):
    torch.manual_seed(0)
    shape = MTPConfig(data.train.vocab_size, 2, dim=16, trunk_layers=1, attention_heads=2)
    model = MTPTransformer(shape)
    batches = data.validation.evaluation_batches(3, batch_size=2, rows=Rows(16))
    measured = evaluate(model, batches, torch.device("cpu"))
    ids = torch.cat([batch["target_ids"] for batch in batches])
    log_probabilities = model.unembed(model(ids.clamp(min=0)).head_hidden_states).log_softmax(-1)
    assert (ids == -100).any()  # the last block is padded
    for k in range(2):
        asked = ids[:, k + 1 :]
        picked = log_probabilities[:, : -k - 1, k].gather(-1, asked.clamp(min=0)[..., None])[..., 0]
        picked = picked[asked != -100]
        assert measured["ce_per_head"][k] == pytest.approx(-picked.mean().item(), rel=1e-4)
    asked = ids[:, 1:]
    right = (log_probabilities[:, :-1, 0].argmax(-1) == asked)[asked != -100]
    assert measured["next_token_accuracy"] == pytest.approx(right.double().mean().item())
    assert model.training


# ---- what is said once ----


def notes_of(trainer, capfd):
    for _ in range(2):
        trainer.train_step(trainer._next_batch())
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize(
    ("algo", "settings", "said"),
    [
        ("rho1-wmtp", {}, "the weights of rho1-wmtp are all 1, .*; pass --horizon 2 or more$"),
        ("rho1-wmtp", {"reduction": "sum"}, "the weights of rho1-wmtp are all 1"),
        ("critic-wmtp", {"value_warmup_steps": 0}, "divides a .*; pass --reduction weight_mean"),
        ("critic-wmtp", {"value_warmup_steps": 0, "reduction": "weight_mean"}, None),
        ("mtp-baseline", {}, None),
        ("rho1-wmtp", {"horizon": 2}, None),
    ],
)
def test_weights_that_cancel_are_said_once(algo, settings, said, data, tmp_path, capfd):
    trainer = make_trainer(algo, data, tmp_path, **{"horizon": 1, **settings})
    notes = notes_of(trainer, capfd)
    assert len(notes) == (said is not None)
    assert said is None or re.search(said, notes[0])


def test_steps_without_a_target_are_said_once(tmp_path, capfd):
    (tmp_path / "a.jsonl").write_text('{"text": "y", "reward": 1}\n' * 40)
    (tmp_path / "b.jsonl").write_text('{"text": "x", "reward": 1}\n' * 40)
    trainer = make_trainer("mtp-baseline", prepare(tmp_path), tmp_path / "run")
    trainer.data.train.rewards[:] = 0
    trainer._next_batch = functools.partial(masked, trainer._next_batch)
    notes = notes_of(trainer, capfd)
    assert len(notes) == 1
    assert "a step had no target at all" in notes[0]


def masked(next_batch):
    batch = next_batch()
    return {**batch, "target_ids": torch.full_like(batch["target_ids"], -100)}
