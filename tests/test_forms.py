"""What `benchmarks/forms.py` times and says."""

import json
import sys

from wmtp.benchmarks import forms


def test_each_form_is_timed_in_both_dtypes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(forms, "SHAPE", (1, 16, 4, 50))
    monkeypatch.setattr(forms, "ROUNDS", 2)
    file = tmp_path / "forms.json"
    monkeypatch.setattr(sys, "argv", ["forms", "--json", str(file)])
    forms.main()
    names = set(forms.forms((1, 16, 4, 50)))
    written = json.loads(file.read_text())["ms"]
    assert set(written) == {"float32", "bfloat16"}
    assert all(set(taken) == names for taken in written.values())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(names)
    assert lines[0].split()[:2] == ["float32", "plain"]
