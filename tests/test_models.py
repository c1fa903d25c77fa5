import pytest
import torch

from support.tiny_runs import VOCABULARY, prepare, write_corpus
from wmtp.models import MTPConfig, MTPTransformer, ValueHead
from wmtp.models.storage import is_model_folder, load_model_folder, save_model_folder

CONFIG = MTPConfig(vocab_size=17, horizon=3, dim=16, trunk_layers=2, attention_heads=2)


@pytest.fixture
def model() -> MTPTransformer:
    torch.manual_seed(0)
    return MTPTransformer(CONFIG).eval()


def test_shapes_and_the_shared_unembedding(model):
    output = model(torch.randint(0, 17, (2, 5)))
    assert output.hidden_states.shape == (2, 5, 16)
    assert output.head_hidden_states.shape == (2, 5, 3, 16)
    logits = model.unembed(output.head_hidden_states)
    assert logits.shape == (2, 5, 3, 17)
    torch.testing.assert_close(logits, output.head_hidden_states @ model.unembed.weight.T)
    assert ValueHead(16)(output.hidden_states).shape == (2, 5)


def test_no_position_sees_a_later_token(model):
    ids = torch.randint(0, 17, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 17
    before, after = model(ids), model(changed)
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first[:, :5], second[:, :5])
        assert not torch.allclose(first[:, 5:], second[:, 5:])


def test_rotary_positions_make_order_matter(model):
    # Without positions, the last state over a set of earlier tokens would not know their order.
    ids = torch.tensor([[1, 2, 3, 4]])
    turned = torch.tensor([[3, 2, 1, 4]])
    model.double()
    before, after = (model(x).head_hidden_states[:, -1] for x in (ids, turned))
    assert not torch.allclose(before, after, atol=1e-9)


def test_each_head_is_a_layer_of_its_own(model):
    ids = torch.arange(4)[None]
    before = model(ids).head_hidden_states
    with torch.no_grad():
        model.heads[1].mlp.down.weight.add_(1.0)
    after = model(ids).head_hidden_states
    torch.testing.assert_close(before[:, :, [0, 2]], after[:, :, [0, 2]])
    assert not torch.allclose(before[:, :, 1], after[:, :, 1])


def test_same_seed_same_weights():
    torch.manual_seed(3)
    first = MTPTransformer(CONFIG)
    torch.manual_seed(3)
    for a, b in zip(first.parameters(), MTPTransformer(CONFIG).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded_is_the_same_model(tmp_path, monkeypatch, tie):
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    tokenizer = prepare(write_corpus(tmp_path / "text")).tokenizer
    config = MTPConfig(VOCABULARY, 2, dim=16, trunk_layers=1, attention_heads=2, tie_embeddings=tie)
    model = MTPTransformer(config)
    folder = tmp_path / "model"
    folder.mkdir()
    save_model_folder(model, tokenizer, folder)
    assert is_model_folder(folder)
    assert not is_model_folder(tmp_path)
    loaded = load_model_folder(folder)
    assert loaded.config == config
    assert (loaded.unembed.weight is loaded.embed.weight) == tie
    ids = torch.randint(0, VOCABULARY, (1, 6))
    logits = [each.unembed(each(ids).head_hidden_states) for each in (loaded, model)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 18}, "multiple of 2 \\* attention_heads = 4, got 18"),
        ({"horizon": 0}, "must be positive"),
        ({"trunk_layers": -1}, "must be positive"),
    ],
)
def test_impossible_shapes(settings, message):
    with pytest.raises(ValueError, match=message):
        MTPConfig(**{"vocab_size": 5, "dim": 16, "attention_heads": 2, **settings})
