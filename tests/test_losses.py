"""`--loss linear|fused|eager`: one training, three ways to compute it."""

import pytest
import torch
from safetensors.torch import load_file

from support.tiny_runs import (
    ALGORITHMS,
    SMALL,
    VOCABULARY,
    differences,
    largest_allocation,
    make_trainer,
    read_metrics,
    small_model,
    train_in_processes,
)
from wmtp.backends import cpu
from wmtp.data.batches import Rows
from wmtp.ops import product
from wmtp.trainers import TrainConfig, losses, reference_model
from wmtp.trainers.config import LOSSES
from wmtp.trainers.evaluation import evaluate

STEPS = 20
LOGITS_BYTES = SMALL["batch_size"] * SMALL["seq_len"] * VOCABULARY * 4  # of one head


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small gain nothing from two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _several_chunks_a_step(monkeypatch):
    """Of 16 rows; at these sizes the default is one chunk for all."""
    monkeypatch.setattr(product, "default_chunk_bytes", lambda row_bytes: 16 * row_bytes)


def curve(algo, data, out, **settings):
    """Each step's record."""
    torch.manual_seed(0)  # of the reference
    trainer = make_trainer(algo, data, out, steps=STEPS, **settings)
    return [trainer.train_step(trainer._next_batch()) for _ in range(trainer.total_steps)]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_one_curve_three_ways(algo, precision, tolerance, data, tmp_path):
    curves = {
        loss: curve(algo, data, tmp_path / loss, loss=loss, precision=precision) for loss in LOSSES
    }
    assert curves["eager"][-1]["loss"] < curves["eager"][-STEPS]["loss"] - 1  # it learns
    for loss in ("linear", "fused"):
        found = differences(curves[loss], curves["eager"])
        assert {"loss", "ce_head_0", "ce_head_2", "weight_entropy", "grad_norm"} <= found.keys()
        if precision == "bf16":  # where logits are alike it is another that is largest
            found = {name: by for name, by in found.items() if not name.startswith("accuracy")}
        assert max(found.values()) < tolerance, (loss, found)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_linear_never_holds_the_logits(algo, loss, data, tmp_path):
    trainer = make_trainer(algo, data, tmp_path, loss=loss, value_warmup_steps=1)
    for _ in range(2):  # critic-wmtp: the value head alone, then the model
        batch = trainer._next_batch()
        largest = largest_allocation(lambda batch=batch: trainer.train_step(batch))
        if loss == "linear":
            assert largest < LOGITS_BYTES
        else:
            assert largest >= SMALL["horizon"] * LOGITS_BYTES


def test_evaluation_never_holds_the_logits(data):
    model = small_model(data.train.vocab_size, horizon=3)
    batches = data.validation.evaluation_batches(2, batch_size=2, rows=Rows(16))
    largest = largest_allocation(lambda: evaluate(model, batches, torch.device("cpu")))
    assert largest < LOGITS_BYTES


@pytest.mark.parametrize("loss", LOSSES)
def test_under_autocast_all_logits_are_bf16(loss, data, tmp_path, monkeypatch):
    seen = []

    def spy(module, name):
        original = getattr(module, name)

        def spied(logits, *arguments, **options):
            seen.append((name, logits.dtype))
            return original(logits, *arguments, **options)

        monkeypatch.setattr(module, name, spied)

    trainer = make_trainer("rho1-wmtp", data, tmp_path, loss=loss, precision="bf16")
    spy(losses, "fused_weighted_mtp_loss")
    spy(reference_model, "next_token_cross_entropy")
    spy(cpu, "rows_ce_")
    trainer.train_step(trainer._next_batch())
    trainer._evaluate()
    called = {"rows_ce_"}  # by the evaluation
    if loss != "linear":
        called |= {"fused_weighted_mtp_loss", "next_token_cross_entropy"}
    assert set(seen) == {(name, torch.bfloat16) for name in called}


def test_two_processes_train_like_one(corpus, tmp_path):
    for processes in (1, 2):
        train_in_processes("rho1-wmtp", corpus, tmp_path / str(processes), processes)
    for part in (".", "reference"):  # the reference is trained before, as mtp-baseline
        one, two = (read_metrics(tmp_path / str(processes) / part) for processes in (1, 2))
        assert len(one) == SMALL["steps"]
        assert max(differences(two, one).values()) < 1e-5
        files = [tmp_path / str(n) / part / "final/model.safetensors" for n in (1, 2)]
        weights, others = (load_file(file) for file in files)
        for name, weight in weights.items():  # AdamW makes much of the rounding of small gradients
            assert (others[name] - weight).abs().mean() < 1e-5, name


def test_the_loss_is_part_of_what_a_run_is():
    linear, fused = (TrainConfig("mtp-baseline", loss=loss) for loss in ("linear", "fused"))
    assert linear.identity() != fused.identity()
    assert TrainConfig("mtp-baseline") == linear
