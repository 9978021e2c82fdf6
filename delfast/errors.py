"""The one exception that delfast raises for bad input."""


class InputError(ValueError):
    """Bad input. The message is one line: what was expected, what came, what to do. Nothing was changed."""
