"""Packed rows: documents that share one are strangers to each other, from the text to the loss."""

import pytest
import torch

from support.tiny_runs import ALGORITHMS, make_trainer, prepare, small_model
from wmtp.data.batches import PADDING, Rows
from wmtp.labels import Targets
from wmtp.trainers.returns import gae_returns, same_document

ROWS = Rows(16, ahead=3, packed=True)


@pytest.fixture(scope="module")
def data(corpus):
    return prepare(corpus)


def test_a_documents_states_are_those_it_has_alone():
    torch.manual_seed(0)
    model = small_model(30, horizon=2)
    ids = torch.randint(30, (1, 9))
    documents = torch.tensor([[4, 4, 4, 4, 9, 9, 9, 9, 9, 9, 9]])  # of the labels ahead, too
    packed = model(ids, documents)
    apart = [model(part) for part in (ids[:, :4], ids[:, 4:])]
    for name in ("hidden_states", "head_hidden_states"):
        alone = torch.cat([getattr(part, name) for part in apart], 1)
        torch.testing.assert_close(getattr(packed, name), alone)


def test_rows_say_which_document_each_token_is_of(data):
    ends = data.train._ends
    for number, step in enumerate(range(3)):
        batch = data.train.batch(step, batch_size=2, rows=ROWS, seed=0)
        for row, block in enumerate(batch["sequence_ids"].tolist()):
            for place, document in enumerate(batch["document_ids"][row].tolist()):
                token = block * 16 + place
                if batch["target_ids"][row, place] == -100:
                    assert document == PADDING, number
                else:
                    assert ends[document] <= token < ends[document + 1]


def test_rows_go_on_in_the_next_block(data):
    plain = data.train.batch(0, batch_size=2, rows=Rows(16), seed=0)
    batch = data.train.batch(0, batch_size=2, rows=Rows(16, ahead=3), seed=0)
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["target_ids"][:, :16], plain["target_ids"])
    for block, ids in zip(batch["sequence_ids"].tolist(), batch["target_ids"], strict=True):
        ahead = data.train._tokens[(block + 1) * 16 :][:3].astype("int64").tolist()
        assert ids[16:].tolist() == ahead + [-100] * (3 - len(ahead))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_step_asks_for_no_token_of_another_document(algo, data, tmp_path):
    trainer = make_trainer(algo, data, tmp_path, pack=True, value_warmup_steps=0)
    batch = trainer._next_batch()
    documents, targets = batch["document_ids"], trainer.targets(batch)
    crossing = 0
    for row in range(len(documents)):
        for t in range(16):
            for k in range(3):
                across = bool(documents[row, t] != documents[row, t + k + 1])
                crossing += across
                assert not (across and targets.valid()[row, t, k])
    record = trainer.train_step(batch)
    assert record["targets"] == targets.valid().sum()
    plain = Targets(batch["target_ids"], 16, 3).valid().sum()
    assert crossing == 0 or record["targets"] < plain


def test_no_return_reaches_over_a_documents_end():
    torch.manual_seed(0)
    rewards, values = torch.randn(1, 7), torch.randn(1, 7)
    ids, documents = torch.ones(1, 7, dtype=torch.long), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    goes_on = same_document(Targets(ids, 7, 1, document_ids=documents))
    mask = torch.ones(1, 7, dtype=torch.bool)
    found = gae_returns(rewards, values, mask, 0.9, 0.8, goes_on)
    apart = [
        gae_returns(rewards[:, part], values[:, part], mask[:, part], 0.9, 0.8)
        for part in (slice(0, 3), slice(3, 7))
    ]
    torch.testing.assert_close(found, torch.cat(apart, 1))
