"""Exceptions. Of a UserError, which the user can mend, programs print one line and exit with 2."""

from ardiff.credentials import hide_credentials


class UserError(ValueError):
    """A user's mistake. The message names the file or setting and says what to do; it is printed and stored, so it
    shows no passwords of URLs.
    """

    def __str__(self) -> str:
        return hide_credentials(super().__str__())


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, for a reason that may have passed: another start may cure it."""


class EchoedError(UserError):
    """A mistake that all ranks know of and that rank 0 reports: the others leave without a word."""
