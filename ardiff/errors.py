"""The one exception that means "the user can mend this": programs print it as a line and exit with 2."""


class UserError(ValueError):
    """A user's mistake. The message names the file or setting and says what to do."""
