"""The one exception by which a command says that the user's input is wrong."""


class UsageError(Exception):
    """Bad input: printed as one line on standard error, exit code 2, nothing written."""
