"""A run is continued where its files hold what they held, wherever they lie."""

import shutil

import pytest

from support.command_line import SMALL, unwrapped, wmtp
from support.tiny_runs import read_metrics, write_corpus
from wmtp.trainers.identity import differences

pytestmark = pytest.mark.usefixtures("one_thread")


def test_copies_are_counted():
    one, two = {"data": {"a": "1"}}, {"data": {"a": "1", "b": "1"}}
    assert differences(one, two) == "data: b is new"
    assert differences(two, one) == "data: b is gone"
    assert differences(two, {"data": {"c": "1", "a": "1"}}) == ""


def test_many_changes_are_counted_and_some_named():
    there = {"data": {f"{n}.txt": str(n) for n in range(9)}}
    asked = {"data": {f"{n}.txt": "other" for n in range(9)}}
    assert differences(there, asked).endswith("2.txt has changed, and 6 more")


def test_moved_and_touched_text_resumes_and_changed_text_is_refused_by_name(tmp_path):
    def resume(data, *more):
        how = ["--algo=mtp-baseline", *SMALL, "--data", data, "--out", tmp_path / "run", *more]
        return wmtp("train", *how)

    text = write_corpus(tmp_path / "text")
    assert resume(text).exit_code == 0
    before = read_metrics(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    moved = tmp_path / "moved"
    shutil.copytree(text, moved)  # of other times, too
    (moved / "story0.txt").rename(moved / "first.txt")
    assert resume(moved, "--resume").exit_code == 0
    assert read_metrics(tmp_path / "run") == before
    (moved / "first.txt").write_text("changed")
    (moved / "story3.txt").write_text("changed")
    refused = resume(moved, "--resume")
    assert refused.exit_code == 1
    assert "data: story3.txt has changed, story0.txt is gone" in unwrapped(refused.output)
    refused = resume(text, "--resume", "--vocab-size=280")
    assert "tokenizer: tokenizer.json has changed, vocab_size: 290 there, 280 asked" in unwrapped(
        refused.output
    )


def test_a_reference_that_has_changed_is_refused_by_name(corpus, tmp_path):
    def train(reference):
        how = ["--algo=rho1-wmtp", *SMALL, "--data", corpus, "--out", tmp_path / "run"]
        return wmtp("train", *how, "--resume", "--ref", reference)

    for seed in (0, 1):
        how = ["--algo=mtp-baseline", *SMALL, "--horizon=1", "--data", corpus, f"--seed={seed}"]
        assert wmtp("train", *how, "--out", tmp_path / f"reference{seed}").exit_code == 0
    assert train(tmp_path / "reference0").exit_code == 0
    moved = shutil.copytree(tmp_path / "reference0", tmp_path / "moved")
    assert train(moved).exit_code == 0
    weights = "final/model.safetensors"
    shutil.copy(tmp_path / "reference1" / weights, moved / weights)
    refused = train(moved)
    assert refused.exit_code == 1
    assert "reference: model.safetensors has changed" in unwrapped(refused.output)


def test_a_vocabulary_that_the_text_does_not_fill_is_said(corpus, tmp_path):
    how = ["--algo=mtp-baseline", *SMALL, "--data", corpus, "--out", tmp_path / "run"]
    result = wmtp("train", *how, "--vocab-size=1000000")
    assert result.exit_code == 0
    assert "a vocabulary of 1,000,000 was asked for, the text has tokens for" in unwrapped(
        result.output
    )
