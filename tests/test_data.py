import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from support.tiny_runs import VOCABULARY, prepare, write_corpus, write_rewarded_corpus
from wmtp.data import DataError, Document, find_corpus, prepare_data
from wmtp.data.batches import Rows
from wmtp.data.tokenizer import END_OF_TEXT, train_tokenizer
from wmtp.trainers.identity import differences


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "text")


def read_all(path):
    return [document for half in find_corpus(path).split() for document in half]


def test_default_corpus_is_the_standard_library_without_its_tests():
    found = find_corpus()
    names = set(found.digests())
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}


def test_files_are_split_whole_and_the_same_way_every_time(corpus):
    first, second = find_corpus(corpus).split(), find_corpus(corpus).split()
    training, validation = (list(documents) for documents in first)
    assert [training, validation] == [list(documents) for documents in second]
    assert (len(training), len(validation)) == (5, 1)
    assert not set(training) & set(validation)


def test_another_file_leaves_the_others_where_they_are(corpus):
    _, before = find_corpus(corpus).split()
    before = set(before)
    for number in range(30):
        (corpus / f"more{number}.txt").write_text(f"more {number}")
    training, after = (set(documents) for documents in find_corpus(corpus).split())
    assert len(after) == 2
    assert len(training | after) == 36


def test_a_single_file_is_split_inside(tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("x" * 95 + "y" * 5)
    training, validation = find_corpus(text).split()
    assert list(training) == [Document("x" * 95, str(text))]
    assert list(validation) == [Document("y" * 5, str(text))]
    lines = tmp_path / "one.jsonl"
    lines.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(40)))
    training, validation = find_corpus(lines).split()
    assert [document.text for document in validation] == ["38", "39"]
    assert len(list(training)) == 38


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"caf\xe9", r"bad\.txt is not UTF-8 at byte 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}', r'bad\.jsonl:2 has no "text"'),
        ("bad.jsonl", b'{"text": "a"}\n\n["b"]', r'bad\.jsonl:3 has no "text"'),
        ("bad.jsonl", b'{"text": ', r"bad\.jsonl:1 is not JSON"),
        (
            "bad.jsonl",
            b'{"text": "a", "reward": "x"}',
            r'bad\.jsonl:1: "reward" must be a finite number',
        ),
        ("bad.jsonl", b'{"text": "a", "reward": 1e39}', "a finite number of float32, got 1e\\+39"),
        ("bad.jsonl", b'{"text": "a", "reward": NaN}', "a finite number of float32, got nan"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', r"bad\.jsonl:2: .*lone surrogate"),
        ("bad.jsonl", b"[" * 100_000, r"bad\.jsonl:1 is not JSON"),
        ("bad.txt", b"\xed\xa0\x80", r"bad\.txt is not UTF-8 at byte 0"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / name)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        find_corpus(tmp_path / "nowhere")
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no text file under .*looked for \.c "):
        find_corpus(tmp_path)


def test_a_reward_on_one_line_of_many_is_named_and_all_files_are_counted(tmp_path):
    lines = [json.dumps({"text": f"line {n}"}) for n in range(398)]
    lines[232] = json.dumps({"text": "the one", "reward": 1})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for name in ("b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(name)
    message = r"1 of 401 documents in 4 files have a reward \(.*a\.jsonl:233 has a reward\): give"
    with pytest.raises(DataError, match=message):
        prepare(tmp_path)


def test_rewards_in_one_half_of_the_split_only(tmp_path):
    for name in ("a", "b"):
        reward = {"reward": 1} if name == "a" else {}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name, **reward}))
    with pytest.raises(DataError, match="1 of 2 documents in 2 files"):
        prepare(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "def"}', encoding="utf-8-sig")
    assert sorted(document.text for document in read_all(tmp_path)) == ["abc", "def"]


def test_names_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"coffee \xff")
    assert len(find_corpus(tmp_path).fingerprint()) == 64
    with pytest.raises(DataError, match=r"caf\\xe9\.txt is not UTF-8 at byte 7"):
        read_all(tmp_path)


def test_suffixes_of_any_case_and_linked_folders_are_taken(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "A.TXT").write_text("linked")
    (elsewhere / "B.JSONL").write_text('{"text": "line"}')
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to(elsewhere)
    (data / "circle").symlink_to(data)
    assert sorted(find_corpus(data).digests()) == ["link/A.TXT", "link/B.JSONL"]
    assert sorted(document.text for document in read_all(data)) == ["line", "linked"]


def test_what_cannot_be_read_is_named_and_skipped_only_when_asked(corpus, monkeypatch):
    (corpus / "gone.txt").symlink_to(corpus / "nowhere")
    os.mkfifo(corpus / "pipe.txt")
    closed = corpus / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="--skip-unreadable") as raised:
        find_corpus(corpus)
    named = (r"closed (Permission denied)", "gone.txt (No such file", "pipe.txt (no regular file)")
    assert all(name in str(raised.value) for name in named)
    found = find_corpus(corpus, skip_unreadable=True)
    assert (len(found.files), len(found.skipped)) == (6, 3)


def test_equal_files_are_on_one_side_of_the_split(corpus):
    for number in range(3):
        (corpus / f"copy{number}.txt").write_text((corpus / "story0.txt").read_text())
    training, validation = (set(half) for half in find_corpus(corpus).split())
    assert not {d.text for d in training} & {d.text for d in validation}


def test_a_written_out_marker_is_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"one {END_OF_TEXT} two")
    (tmp_path / "b.txt").write_text(f"three {END_OF_TEXT} four")
    data = prepare(tmp_path)
    end = data.tokenizer.token_to_id(END_OF_TEXT)
    for half in (data.train, data.validation):
        ids = half.batch(0, batch_size=1, rows=Rows(len(half)), seed=0)["input_ids"][0].tolist()
        assert ids.index(end) == len(ids) - 1
        assert END_OF_TEXT in data.tokenizer.decode(ids[:-1])


def test_a_tokenizer_whose_ids_have_holes(corpus, tmp_path):
    file = tmp_path / "tokenizer.json"
    ids = {"the": 0, "cat": 7, "sat": 70_000, END_OF_TEXT: 99_999, "?": 3}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(file))
    train = prepare_data(find_corpus(corpus), tokenizer_file=file).train
    assert train.vocab_size == 100_000
    ids = train.batch(0, batch_size=1, rows=Rows(len(train)), seed=0)["input_ids"]
    assert set(ids.unique().tolist()) == {0, 3, 7, 70_000, 99_999}


@given(text=st.text(max_size=60))
@settings(max_examples=40, deadline=None)
def test_every_text_survives_the_tokenizer(text):
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, 270)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokens_on_disk_are_the_documents_with_an_end_each(corpus):
    data = prepare(corpus)
    assert data.train.vocab_size == data.tokenizer.get_vocab_size() == VOCABULARY
    end = data.tokenizer.token_to_id(END_OF_TEXT)
    (document,) = find_corpus(corpus).split()[1]
    count = len(data.validation)
    ids = data.validation.batch(0, batch_size=1, rows=Rows(count), seed=0)["input_ids"][0].tolist()
    assert ids == [*data.tokenizer.encode(document.text).ids, end]
    file = next(corpus.parent.glob("cache/tokens-*/validation/tokens.bin"))
    assert file.stat().st_size == 2 * count


def test_the_cache_is_used_for_what_was_moved_or_touched_and_notices_changes(corpus, cache):
    first = prepare(corpus)
    entries = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert prepare(corpus).identity == first.identity
    moved = corpus.rename(corpus.with_name("moved"))
    (moved / "story0.txt").rename(moved / "other.txt")
    (moved / "story1.txt").touch()
    assert differences(first.identity, prepare(moved).identity) == ""
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == entries
    (moved / "story2.txt").write_text("changed")
    changed = differences(first.identity, prepare(moved).identity)
    assert changed.startswith("data: story2.txt has changed")


def test_a_link_to_itself_is_named(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=r"cannot read .*loop.*: pass a file or a folder"):
        find_corpus(loop)


def test_a_tokenizer_of_ones_own(corpus, tmp_path):
    own = train_tokenizer(["the dog sat"] * 5, 280)
    file = tmp_path / "tokenizer.json"
    own.enable_padding(length=50)  # as exported beside some models
    own.save(str(file))
    data = prepare_data(find_corpus(corpus), tokenizer_file=file)
    assert data.train.vocab_size == own.get_vocab_size()
    (document,) = find_corpus(corpus).split()[1]
    own.no_padding()
    assert len(data.validation) == len(own.encode(document.text).ids) + 1


def test_unusable_tokenizers(corpus, tmp_path):
    file = tmp_path / "tokenizer.json"
    for content, message in (
        (None, "no tokenizer file"),
        ("{}", "is not a tokenizer"),
        (Tokenizer(models.BPE()).to_str(), "to put between documents"),
    ):
        if content is not None:
            file.write_text(content)
        with pytest.raises(DataError, match=message):
            prepare_data(find_corpus(corpus), tokenizer_file=file)
    with pytest.raises(DataError, match="vocab_size must be at least 257"):
        prepare_data(find_corpus(corpus), vocab_size=200)
    with pytest.raises(DataError, match="at most 2147483647, got 99999999999"):
        prepare_data(find_corpus(corpus), vocab_size=99999999999)


@given(step=st.integers(0, 2**40), seed=st.integers(0, 2**32), stream=st.integers(0, 3))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_batches_are_a_function_of_seed_stream_and_step(corpus, step, seed, stream):
    def draw(**change):
        place = {"step": step, "seed": seed, "stream": stream, **change}
        return prepare(corpus).train.batch(batch_size=4, rows=Rows(8), **place)

    batch = draw()
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].shape == (4, 8)
    assert torch.equal(batch["sequence_ids"], draw()["sequence_ids"])
    tokens = np.fromfile(next(corpus.parent.glob("cache/tokens-*/train/tokens.bin")), np.uint16)
    for row, block in zip(batch["target_ids"], batch["sequence_ids"].tolist(), strict=True):
        wanted = tokens[8 * block : 8 * block + 8].tolist()
        assert row.tolist() == wanted + [-100] * (8 - len(wanted))
    others = [draw(step=step + 1), draw(seed=seed + 1), draw(stream=stream + 1)]
    assert not all(torch.equal(batch["sequence_ids"], b["sequence_ids"]) for b in others)


@pytest.mark.parametrize("rewarded", [False, True])
def test_every_token_is_seen_once_an_epoch_in_an_order_of_its_own(rewarded, tmp_path):
    write = write_rewarded_corpus if rewarded else write_corpus
    train = prepare(write(tmp_path / "text")).train
    rows = len(train.rewards) if rewarded else -(-len(train) // 16)
    how = {"batch_size": 3, "rows": Rows(16), "seed": 5}
    batches = [train.batch(step, **how) for step in range(2 * rows)]  # six epochs
    drawn = torch.cat([batch["sequence_ids"] for batch in batches]).view(6, rows)
    for epoch in drawn:
        assert sorted(epoch.tolist()) == list(range(rows))
    assert len({tuple(epoch.tolist()) for epoch in drawn}) == 6
    targets = torch.cat([batch["target_ids"] for batch in batches])[:rows]
    if not rewarded:
        assert (targets != -100).sum() == len(train)


def test_rewarded_rows_are_documents_cut_or_padded(tmp_path):
    data = prepare(write_rewarded_corpus(tmp_path / "text"))
    for seq_len in (4, 40):
        batch = data.train.batch(0, batch_size=16, rows=Rows(seq_len), seed=0)
        assert batch["input_ids"].shape == batch["target_ids"].shape == (16, seq_len)
        padded = batch["target_ids"] == -100
        assert torch.equal(batch["input_ids"][~padded], batch["target_ids"][~padded])
        assert padded.any() == (seq_len == 40)
        for ids, targets, reward in zip(
            batch["input_ids"], batch["target_ids"], batch["reward"], strict=True
        ):
            text = data.tokenizer.decode(ids[targets != -100].tolist())
            assert text.startswith("the cat"[:seq_len] if reward == 1 else "the ")
            assert ("cat" in text) == (reward == 1) or seq_len == 4


def test_evaluation_covers_the_file_evenly_and_repeatably(corpus):
    data = prepare(corpus).train
    batches = data.evaluation_batches(3, batch_size=2, rows=Rows(8))
    starts = torch.cat([batch["sequence_ids"] for batch in batches]).tolist()
    assert starts[0] == 0
    assert starts[-1] == (len(data) - 1) // 8
    assert len(starts) == 6
    again = data.evaluation_batches(3, batch_size=2, rows=Rows(8))
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True)
    )
    few = data.evaluation_batches(100, batch_size=2, rows=Rows(len(data)))
    assert [len(batch["input_ids"]) for batch in few] == [1]


def test_too_little_text(corpus):
    data = prepare(corpus).validation
    with pytest.raises(DataError, match=r"fewer than one sequence of 5000.*--seq-len"):
        data.batch(0, batch_size=1, rows=Rows(5000), seed=0)


@pytest.mark.parametrize("content", [b"{oops", b'{"model": 3}', b"\xff\xfe", b"[]"])
def test_a_broken_tokenizer_is_named(content, corpus, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
        prepare_data(find_corpus(corpus), tokenizer_file=file)
