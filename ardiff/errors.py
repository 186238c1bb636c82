"""Exceptions. Of a UserError, which the user can mend, programs print one line and exit with 2."""


class UserError(ValueError):
    """A user's mistake. The message names the file or setting and says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, for a reason that may have passed: another start may cure it."""


class EchoedError(UserError):
    """A mistake that all ranks know of and that rank 0 reports: the others leave without a word."""
