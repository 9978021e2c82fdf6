"""Packages that the core install lacks: the ``experiments`` extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(what: str, advice: str = "") -> Iterator[None]:
    """Raise a one-line ImportError that names the extra if an import inside the context fails.

    ``what`` is the feature that needs the package; ``advice`` is an alternative without it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "delfast"):
            raise
        raise ModuleNotFoundError(
            f"{what} needs '{package}', which is not installed; pip install 'delfast[experiments]'{advice}",
            name=error.name,
        ) from None
