"""The cache of tokenised text: what is damaged there, and text that there is none of."""

import os
from pathlib import Path

import pytest

from support.tiny_runs import prepare, write_corpus
from wmtp.data import DataError
from wmtp.files import FileError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "text")


def test_a_cache_that_cannot_be_written(corpus, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("WMTP_CACHE", str(blocked / "cache"))
    with pytest.raises(FileError, match=r"cannot write .*file/cache.*bytes free.*set WMTP_CACHE"):
        prepare(corpus)


def cut(file):
    os.truncate(file, file.stat().st_size - 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def break_off(file):
    file.write_text("{")


def as_a_pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("spoil", [cut, flip, break_off, Path.unlink, as_a_pipe])
@pytest.mark.parametrize(
    "name", ["tokens-*/train/tokens.bin", "tokens-*/train/meta.json", "tokenizer-*/tokenizer.json"]
)
def test_a_damaged_cache_is_made_again_and_it_is_said(spoil, name, corpus, cache):
    assert prepare(corpus).notes == ()
    file = next(cache.glob(name))
    whole = file.read_bytes()
    spoil(file)
    (note,) = prepare(corpus).notes
    assert note.startswith(f"{cache / name.split('/')[0][:6]}")
    assert f"is damaged ({file.relative_to(next(cache.glob(name.split('/')[0])))} " in note
    assert note.endswith("it was made again")
    assert file.read_bytes() == whole
    assert prepare(corpus).notes == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", ""),
        ("a.txt", " \n\t\n"),
        ("a.txt", "\ufeff"),
        ("a.jsonl", ""),
        ("a.jsonl", '{"text": "", "reward": 1}\n' * 40),
        ("a.jsonl", '{"text": " "}\n' * 40),
    ],
)
def test_empty_text_is_named(name, content, tmp_path):
    file = tmp_path / "text" / name
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(DataError, match=rf"{name} is empty, or only white space: pass"):
        prepare(file)
    (file.parent / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"training text of .*/text is empty"):
        prepare(file.parent)


def test_a_failed_build_leaves_nothing(corpus, cache):
    prepare(corpus)
    kept = set(cache.iterdir())
    (corpus / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(corpus)
    assert set(cache.iterdir()) == kept
