"""What is said to the user once a process."""

import warnings

_said: set[str] = set()


def warn_once(message: str, stacklevel: int = 4) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
