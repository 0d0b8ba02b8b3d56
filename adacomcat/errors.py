"""The error for bad input, and what it quotes of the errors of others."""


class UserError(ValueError):
    """Bad input: one line that names what is wrong and the mend; the command line exits with 2.

    A name that the message quotes from a file may have any character: those that break lines or
    are invisible are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def reason(error: BaseException) -> str:
    """What a library's error says, on one short line; its name where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
