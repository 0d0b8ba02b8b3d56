"""Errors that the user can mend."""


class UserError(ValueError):
    """Bad input: the message names what is wrong and how to mend it (CLI exit code 2)."""
