import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from support.tiny_runs import largest_allocation, make_trainer, small_model
from wmtp import next_token_cross_entropy
from wmtp.data.batches import Rows
from wmtp.data.tokenizer import train_tokenizer
from wmtp.ops import product
from wmtp.registry import trainer_registry
from wmtp.trainers import ConfigError, RunFolder, TrainConfig
from wmtp.trainers.config import LOSSES
from wmtp.trainers.reference_model import (
    LinearReference,
    WholeReference,
    _tells_documents_apart,
    find_reference,
    load_reference,
    prepare_reference,
    reference_ce,
    reference_digests,
)

CPU = torch.device("cpu")


def test_every_kind_of_reference(data):
    ids = torch.randint(0, 20, (2, 5))
    logits = torch.randn(2, 5, 20, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 20), ids[:, 1:].reshape(-1), reduction="none"
    ).reshape(2, 4)
    for reference in (
        lambda _: logits,
        lambda _: logits[:, :, None],
        lambda _: SimpleNamespace(logits=logits),
    ):
        for way in LOSSES:
            found = reference_ce(prepare_reference(reference, CPU, way), ids, ids, way)
            torch.testing.assert_close(found, expected)
            assert not found.requires_grad
    with pytest.raises(ConfigError, match=r"an object with \.logits, got dict"):
        reference_ce(lambda _: {"logits": logits}, ids, ids)
    with pytest.raises(ConfigError, match=r"must return logits \[B, S, V\], got \(2, 5, 3, 20\)"):
        reference_ce(lambda _: logits[:, :, None].expand(-1, -1, 3, -1), ids, ids)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_is_frozen_and_asked_once_a_step(loss, data, tmp_path):
    model, calls = small_model(data.train.vocab_size), []
    trainer = make_trainer("rho1-wmtp", data, tmp_path, model, loss=loss)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.register_forward_hook(lambda *_: calls.append(1))
    trainer.train_step(trainer._next_batch())
    assert len(calls) == 1


def test_rho1_without_a_reference(data, tmp_path):
    config = TrainConfig(algo="rho1-wmtp")
    with pytest.raises(ConfigError, match="needs a reference"):
        trainer_registry.get("rho1-wmtp")(config, data, RunFolder(tmp_path))


def save_gpt2(data, folder, **changes):
    """Of random weights, with the data's tokenizer beside it."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": data.train.vocab_size, "n_embd": 8, "n_layer": 1, "n_head": 2}
    shape |= {"n_positions": 32, "bos_token_id": 0, "eos_token_id": 0, **changes}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(folder)
    data.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_hugging_face_folder_as_reference(data, tmp_path):
    fits = save_gpt2(data, tmp_path / "fits")
    model = load_reference(fits, data.tokenizer, 32)
    ids = data.train.batch(0, batch_size=2, rows=Rows(16), seed=0)["input_ids"]
    assert reference_ce(model, ids, ids).shape == (2, 15)
    for folder, seq_len, message in (
        (save_gpt2(data, tmp_path / "small", vocab_size=100), 16, r"knows 100 tokens.*--tokenizer"),
        (fits, 33, r"fits reads 32 tokens at once, --seq-len is 33: pass --seq-len 32"),
        (tmp_path / "nothing", 16, "no model in"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_reference(folder, data.tokenizer, seq_len)
    for config in ("{}", "[]", "{oops"):
        (tmp_path / "small" / "config.json").write_text(config)
        with pytest.raises(ConfigError, match="transformers cannot load a model"):
            load_reference(tmp_path / "small", data.tokenizer, 16)


def test_a_reference_of_another_tokenizer_or_of_none(data, tmp_path):
    folder = save_gpt2(data, tmp_path / "model")
    file = folder / "tokenizer.json"
    ours = json.loads(file.read_text())
    other_merges = {**ours, "model": {**ours["model"], "merges": ours["model"]["merges"][:1]}}
    other_ids = train_tokenizer(["some other text of other words"] * 5, 280).to_str()
    for tokenizer in (json.dumps(other_merges), other_ids):
        file.write_text(tokenizer)
        with pytest.raises(ConfigError, match=r"another tokenizer.*--tokenizer .*tokenizer\.json"):
            load_reference(folder, data.tokenizer, 16)
    larger = data.tokenizer.from_str(json.dumps(ours))
    larger.add_tokens(["new"])  # which the data has not
    larger.save(str(file))
    load_reference(folder, data.tokenizer, 16)
    file.unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        load_reference(folder, data.tokenizer, 16)


def test_a_tokenizer_in_the_older_files_is_compared(data, tmp_path):
    folder = save_gpt2(data, tmp_path / "model")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    load_reference(folder, data.tokenizer, 16)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ConfigError, match="another tokenizer than the training data"):
        load_reference(folder, data.tokenizer, 16)


def test_a_reference_of_the_hub_is_taken_from_its_cache(data, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    model = cache / "models--some--model"
    save_gpt2(data, model / "snapshots" / "0123")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder = find_reference("some/model")
    load_reference(folder, data.tokenizer, 16)
    assert "config.json" in reference_digests(folder)
    for name in ("some/other", "no such id", str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match=r"no folder .*hub's cache: pass a folder, or fetch"):
            find_reference(name)


# ---- a reference in two parts ----

HEADS = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}


def hugging_face(name, **settings):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**HEADS, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def louder(model):
    """With logits so large that a soft cap or a scale is seen in the cross entropies."""
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=4.0)
    return model


def agree(model):
    """Prepared for each of the three ways, it has the cross entropies of its own logits."""
    ids = torch.randint(0, 300, (2, 16))
    expected = next_token_cross_entropy(model.eval()(ids).logits, ids, backend="eager")
    prepared = {way: prepare_reference(model, CPU, way) for way in LOSSES}
    assert all(isinstance(prepared[way], WholeReference) for way in ("fused", "eager"))
    for way, reference in prepared.items():
        found = reference_ce(reference, ids, ids, way)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
        assert not found.requires_grad
    return prepared["linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": None}),
        ("Granite", {"logits_scaling": 1.0}),
    ],
)
def test_logits_that_are_a_product_are_never_made(name, settings, dtype, monkeypatch):
    monkeypatch.setattr(product, "default_chunk_bytes", lambda row_bytes: 8 * row_bytes)
    model = louder(hugging_face(name, **settings)).to(dtype)
    reference = agree(model)
    assert isinstance(reference, LinearReference)
    ids = torch.randint(0, 300, (2, 16))
    logits_bytes = ids.numel() * 300 * dtype.itemsize
    assert largest_allocation(lambda: reference_ce(reference, ids, ids)) < logits_bytes
    assert largest_allocation(lambda: reference_ce(model, ids, ids)) >= logits_bytes


@pytest.mark.parametrize("loud", [True, False])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("Gemma2", {"final_logit_softcapping": 30.0}), ("Granite", {"logits_scaling": 8.0})],
)
def test_what_is_more_than_a_product_is_read_as_logits(name, settings, loud):
    model = hugging_face(name, **settings)
    assert isinstance(agree(louder(model) if loud else model), WholeReference)


def test_a_head_that_is_not_all_between_states_and_logits():
    before = louder(hugging_face("Llama"))
    before.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2,))
    after = hugging_face("Llama")  # whose logits are below what cuts them
    after.lm_head.register_forward_hook(lambda _, inputs, output: output.clamp(max=9.0))
    for model in (before, after):
        assert isinstance(agree(model), WholeReference)


DOCUMENTS = torch.tensor([[0] * 7 + [1] * 9, [3] * 16])


@pytest.mark.parametrize("way", LOSSES)
@pytest.mark.parametrize(
    ("name", "settings"), [("Llama", {}), ("Gemma2", {"final_logit_softcapping": 30.0})]
)
def test_packed_documents_are_read_apart(name, settings, way):
    model = louder(hugging_face(name, **settings))
    ids = torch.randint(0, 300, (2, 16))
    reference = prepare_reference(model, CPU, way)
    found = reference_ce(reference, ids, ids, way, DOCUMENTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = [reference_ce(reference, part, part, way) for part in ids[:1].split((7, 9), 1)]
        whole = reference_ce(reference, ids[1:], ids[1:], way)
    torch.testing.assert_close(torch.cat((found[:1, :6], found[:1, 7:]), 1), torch.cat(parts, 1))
    torch.testing.assert_close(found[1:], whole)


def test_a_model_that_only_takes_position_ids_does_not_know_documents():
    base = hugging_face("Llama").eval().base_model
    assert _tells_documents_apart(base)
    whole = base.forward
    base.forward = lambda input_ids, position_ids=None, use_cache=None: whole(
        input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids)
    )
    assert not _tells_documents_apart(base)


def test_a_reference_that_reads_packed_documents_as_one_text_says_so(monkeypatch):
    monkeypatch.setattr("wmtp.once._said", set())
    ids, logits = torch.randint(0, 300, (2, 16)), torch.randn(2, 16, 300)
    with pytest.warns(RuntimeWarning, match="reads packed documents as one text"):
        found = reference_ce(lambda _: logits, ids, ids, "fused", DOCUMENTS)
    assert torch.equal(found, next_token_cross_entropy(logits, ids))


def test_our_own_model_of_one_head():
    model, ids = small_model(300), torch.randint(0, 300, (2, 16))
    expected = next_token_cross_entropy(model.unembed(model(ids).head_hidden_states[:, :, 0]), ids)
    for way in LOSSES:
        reference = prepare_reference(model, CPU, way)
        torch.testing.assert_close(reference_ce(reference, ids, ids, way), expected.detach())
    with pytest.raises(ConfigError, match="the reference predicts 3 tokens ahead"):
        prepare_reference(small_model(300, horizon=3), CPU)
