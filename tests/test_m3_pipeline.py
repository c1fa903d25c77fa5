"""Text to trained model, the whole way, for one algorithm or all.

As a script on the real default text: `python tests/test_m3_pipeline.py --algo rho1-wmtp --tiny`
"""

import argparse
import json
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.tiny_runs import read_metrics, write_corpus
from wmtp.cli.app import app
from wmtp.models.storage import load_model_folder
from wmtp.registry import trainer_registry

SMALL = ["--tiny", "--steps=40", "--batch-size=4", "--seq-len=32", "--vocab-size=290"]
SMALL += ["--value-warmup-steps=3", "--lr=0.01", "--save-every=20"]


def run_pipeline(algo: str, arguments: list[str], out: Path) -> dict:
    """Train, and check what a run promises; returns its result."""
    finished = CliRunner().invoke(app, ["train", "--algo", algo, *arguments, "--out", str(out)])
    assert finished.exit_code == 0, finished.output
    print(finished.output)
    result = json.loads((out / "result.json").read_text())
    records = read_metrics(out)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    horizon = load_model_folder(out / "final").config.horizon
    wanted = {"step", "stage", "loss", "weight_entropy", "lr", "grad_norm"}
    wanted |= {f"ce_head_{k}" for k in range(horizon)} | {
        f"weight_head_{k}" for k in range(horizon)
    }
    assert all(wanted <= record.keys() for record in records)
    return result


def fall_of_head_0(result: dict) -> float:
    return result["start"]["ce_per_head"][0] - result["end"]["ce_per_head"][0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("algo", trainer_registry.names())
def test_pipeline(algo, tmp_path, monkeypatch):
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    corpus = write_corpus(tmp_path / "text")
    result = run_pipeline(algo, [*SMALL, "--data", str(corpus)], tmp_path / "run")
    assert fall_of_head_0(result) > 1.5
    stages = [record["stage"] for record in read_metrics(tmp_path / "run")]
    assert stages.count("train") == 40
    assert stages.count("value_warmup") == (3 if algo == "critic-wmtp" else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algo", required=True, choices=trainer_registry.names())
    parser.add_argument("--tiny", action="store_true", help="the preset for a laptop")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run_pipeline(chosen.algo, ["--tiny"] * chosen.tiny, Path(folder, "run"))
    fall = fall_of_head_0(result)
    print(f"validation cross entropy of head 0 fell by {fall:.2f} nats (at least 1.5 wanted)")
    assert fall > 1.5


if __name__ == "__main__":
    main()
