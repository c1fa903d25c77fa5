"""The same global batch in one process or two, at once or in parts: the same run."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.tiny_runs import ALGORITHMS, differences, read_metrics, train_in_processes
from wmtp.data.batches import Rows

STEPS, BATCH = 6, 8
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def padded_corpus(tmp_path_factory):
    """Documents of many lengths with rewards; a third of them are empty, so that with two rows a
    process some step finds a process without a target."""
    folder = tmp_path_factory.mktemp("padded")
    texts = ("", "the cat sat on the mat", "a", "the owl", "", "the dog sat on the road and slept")
    for name in ("a", "b", "c"):
        lines = [json.dumps({"text": text, "reward": len(text) / 10}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def assert_agree(algo, corpus, tmp_path, ways, **settings):
    settings = {"steps": STEPS, "batch_size": BATCH, **settings}
    runs = []
    for processes, parts in [(1, 1), *ways]:
        out = tmp_path / f"{processes}-{parts}"
        train_in_processes(algo, corpus, out, processes, grad_accum=parts, **settings)
        runs.append(out)
    first, *others = runs
    for other in others:
        found = differences(read_metrics(other), read_metrics(first))
        assert max(found.values()) < 1e-5, (other.name, found)
        ours, theirs = (load_file(run / "final/model.safetensors") for run in (first, other))
        distance = sum((ours[name] - theirs[name]).square().sum() for name in ours)
        assert (distance / sum(each.square().sum() for each in ours.values())).sqrt() < 1e-4


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_of_every_algorithm(algo, corpus, tmp_path):
    assert_agree(algo, corpus, tmp_path, [(1, 4), (2, 1), (2, 2)])


@pytest.mark.parametrize("reduction", ["token_mean", "weight_mean"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_with_padding_rewards_and_a_process_without_a_target(
    algo, reduction, padded_corpus, tmp_path
):
    ways = [(2, 1), (2, 2)] if reduction == "token_mean" else [(2, 2)]
    assert_agree(algo, padded_corpus, tmp_path, ways, batch_size=4, reduction=reduction)


@pytest.mark.parametrize("reduction", ["pair_mean", "head_mean"])
def test_with_packed_documents_and_what_labels_divide_by(reduction, corpus, tmp_path):
    how = {"reduction": reduction, "pack": True}
    assert_agree("rho1-wmtp", corpus, tmp_path, [(2, 2)], **how)


@pytest.mark.parametrize("reduction", ["token_mean", "weight_mean", "sum"])
def test_with_tokens_of_weight_0(reduction, corpus, tmp_path):
    algo = "support.outside_algorithms:SomeTokensTrainer"
    assert_agree(algo, corpus, tmp_path, [(2, 2)], reduction=reduction, lr=1e-3)


def test_some_process_had_no_target(padded_corpus):
    """What the corpus is for."""
    from support.tiny_runs import SMALL, prepare

    data = prepare(padded_corpus).train
    batches = [
        data.batch(step, batch_size=4, rows=Rows(SMALL["seq_len"]), seed=0) for step in range(STEPS)
    ]
    targets = torch.stack([(batch["target_ids"][:, 1:] != -100).any(1) for batch in batches])
    assert not (targets[:, ::2].any(1) & targets[:, 1::2].any(1)).all()
