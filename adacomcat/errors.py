"""The error for bad input."""


class UserError(ValueError):
    """Bad input: one line that names what is wrong and the mend; the command line exits with 2."""

    def __str__(self) -> str:
        """The line alone, where a DataLoader put the traceback of its worker process before it."""
        text = super().__str__()
        if text.startswith("Caught UserError in DataLoader worker"):
            return text.rpartition("adacomcat.errors.UserError: ")[2].strip()
        return text
