"""Pictures that plots have written."""

from pathlib import Path


def assert_drawn(file: Path) -> None:
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000  # an empty picture of this size has less
