"""How a command says that the user's input is wrong."""

MOST_SAID = 1000  # characters of a message
INTERRUPTED = 130  # the shell's exit code for a program that Ctrl-C ended
CUT_OFF = 141  # likewise for one whose output nobody reads any more


class UsageError(Exception):
    """Bad input: printed as one line on standard error, exit code 2, nothing written."""


def one_line(value: object) -> str:
    """`value` on one line, the beginning of it where it is long."""
    text = printable(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def printable(value: object) -> str:
    """`value` on one line: the name of a file may have several."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def said(error: Exception) -> str:
    """The message of an error as a terminal may see it: a file says what it likes, and may be long
    or steer the terminal."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    return text if len(text) <= MOST_SAID else f"{text[: MOST_SAID - 3]}..."
