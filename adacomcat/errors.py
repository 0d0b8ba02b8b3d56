"""The error for bad input."""


class UserError(ValueError):
    """Bad input: one line that names what is wrong and the mend; the command line exits with 2."""
