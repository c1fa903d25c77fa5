"""What a run is: its settings, and its data and reference model by what their files hold."""

import hashlib
import json
from collections import Counter
from typing import Any

from wmtp.files import shown

Digests = dict[str, str]
OF_FILES = ("data", "tokenizer", "reference")  # digests by name
LISTED = 3


def differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    """How two runs differ, in words; "" where they do not. A file may have another name.

    >>> differences({"steps": 9, "data": {"a.txt": "1"}}, {"steps": 9, "data": {"b.txt": "1"}})
    ''
    >>> differences({"steps": 9, "data": {"a.txt": "1"}}, {"steps": 8, "data": {"a.txt": "2"}})
    'data: a.txt has changed, steps: 9 there, 8 asked'
    """
    found = []
    for name in sorted(there.keys() | asked.keys()):
        one, other = there.get(name), asked.get(name)
        if name in OF_FILES and isinstance(one, dict) and isinstance(other, dict):
            changes = _changes(one, other)
            found += [f"{name}: {', '.join(changes)}"] if changes else []
        elif one != other:
            found.append(f"{name}: {_worded(one)} there, {_worded(other)} asked")
    return ", ".join(found)


def identity_digest(identity: dict[str, Any]) -> str:
    """Equal for two runs where `differences` finds nothing.

    >>> one, other = {"steps": 9, "data": {"a.txt": "1"}}, {"data": {"b.txt": "1"}, "steps": 9}
    >>> identity_digest(one) == identity_digest(other) != identity_digest({"steps": 9})
    True
    """
    nameless = {
        name: sorted(map(str, value.values()))
        if name in OF_FILES and isinstance(value, dict)
        else value
        for name, value in identity.items()
        if value is not None
    }
    return hashlib.sha256(json.dumps(nameless, sort_keys=True).encode()).hexdigest()


def _changes(there: Digests, asked: Digests) -> list[str]:
    gone = Counter(there.values()) - Counter(asked.values())
    new = Counter(asked.values()) - Counter(there.values())
    changed = [name for name, digest in there.items() if digest in gone and name in asked]
    words = [f"{shown(name)} has changed" for name in changed if asked[name] != there[name]]
    words += _one_sided("gone", there, gone, asked) + _one_sided("new", asked, new, there)
    more = len(words) - LISTED
    return words[:LISTED] + ([f"and {more} more"] if more > 0 else [])


def _one_sided(word: str, digests: Digests, chosen: Counter[str], others: Digests) -> list[str]:
    return [
        f"{shown(name)} is {word}"
        for name, digest in digests.items()
        if digest in chosen and name not in others
    ]


def _worded(value: Any) -> str:
    if isinstance(value, dict) and value:
        return " ".join(sorted(value)[:LISTED])
    return str(value)
