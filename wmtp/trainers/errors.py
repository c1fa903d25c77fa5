"""What ends a run that the user can mend."""


class RunError(RuntimeError):
    """The run folder and the request do not fit; says what to do."""


class StoppedError(RuntimeError):
    """The run was asked to stop, and has saved where it is."""
