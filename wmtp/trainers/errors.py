"""What ends a run that the user can mend."""


class RunError(RuntimeError):
    """The run folder and the request do not fit; says what to do."""


class StoppedError(RuntimeError):
    """The run was asked to stop, and has saved where it is."""


def worded(error: BaseException) -> str:
    """In one line.

    >>> worded(ValueError("not so\\nfor many reasons"))
    'ValueError: not so'
    """
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
