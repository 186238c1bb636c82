"""Exceptions that mean "the user can mend this": programs print one line and exit with 2."""


class UserError(ValueError):
    """A user's mistake. The message names the file or setting and says what to do."""


class EchoedError(UserError):
    """A mistake that all ranks know of and that rank 0 reports: the others leave without a word."""
