"""The instruction sets of the C++ kernel, and which of them this machine has."""

from wmtp.backends import cpu_library

ALL = ("avx512_bf16", "avx512", "avx2", "baseline")


def why_not(name: str) -> str | None:
    """What stands in the way of that one here; it is chosen if nothing does."""
    if reason := cpu_library.unavailable():
        return f"no CPU kernel: {reason}"
    try:
        cpu_library.select_instruction_set(cpu_library.load(), name)
    except RuntimeError as missing:
        if name == "baseline":
            raise
        return str(missing)
    return None


def _found() -> tuple[str, ...]:
    if cpu_library.unavailable():
        return ("baseline",)  # whose tests say why they are skipped
    found = tuple(name for name in ALL if why_not(name) is None)
    cpu_library.select_instruction_set(cpu_library.load(), "")
    return found


# So that no test is collected, and no pair of values given to one, that is then skipped.
HERE = _found()
