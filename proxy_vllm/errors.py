"""Errors that a user can mend: the command line shows their text alone, without a traceback."""


class UserError(ValueError):
    """Bad input or set-up. The message names the culprit and the way out, in one line."""
