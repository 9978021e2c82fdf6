"""Identifiers of examples as a ledger stores them: as text, or as keyed hashes from which nobody reads them back."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from delfast.errors import InputError, is_line

KEY_BYTES = 32  # of a key made here: as long as SHA-256's output, which RFC 2104, section 3, advises
MIN_KEY_BYTES = 16
# its HMAC recognises a key; no identifier is equal to it, since identifiers are printable
KEY_CHECK = "delfast ledger\n"


class RefusedIdentifier(InputError):
    """An identifier that a request cannot name; the attribute ``identifier`` holds it, as text."""

    def __init__(self, message: str, identifier: str) -> None:
        super().__init__(message)
        self.identifier = identifier


class Identifiers:
    """Conversion of identifiers to what the ledger stores: unchanged without a key, else HMAC-SHA-256 (RFC 2104)."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key

    @property
    def key_check(self) -> str | None:
        """HMAC of a constant, by which a wrong key is recognised; None without a key."""
        return None if self._key is None else self.stored(KEY_CHECK)

    def stored(self, identifier: str) -> str:
        """Return an identifier as the ledger stores it."""
        if self._key is None:
            return identifier
        return hmac.digest(self._key, identifier.encode("utf-8"), "sha256").hex()

    def originals(self, identifiers: Iterable[str], wanted: set[str]) -> dict[str, str]:
        """Return, for each stored form in ``wanted``, the one of ``identifiers`` that has it."""
        pairs = ((self.stored(each), each) for each in identifiers)
        return {stored: each for stored, each in pairs if stored in wanted}


def read_key(path: str | os.PathLike[str], ledger: Path, *, make: bool = False) -> bytes:
    """Read the key file: its content without surrounding white space.

    With ``make`` a file that does not exist is made, readable by its owner alone. InputError for a file inside the
    ledger's directory, since whoever gets a copy of the ledger would have the key too, and for a short key.
    """
    path = Path(path)
    if path.resolve().is_relative_to(Path(ledger).resolve()):
        raise InputError(f"expected a key file outside the ledger, got '{path}' inside '{ledger}'; keep it elsewhere")
    try:
        if make and not path.exists():
            _make_key(path)
        key = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"cannot read the key file '{path}' ({error.strerror}); check --hash-ids") from None
    if len(key) < MIN_KEY_BYTES:
        raise InputError(
            f"expected a key of at least {MIN_KEY_BYTES} bytes in '{path}', got {len(key)}; "
            "name a file that does not exist, and `delfast ledger init` makes a key there"
        )
    return key


def _make_key(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="ascii") as stream:
        stream.write(secrets.token_hex(KEY_BYTES) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def checked(identifiers: Iterable[str | int]) -> list[str]:
    """Return the identifiers of one request as text; InputError for none, and by name for a duplicate or a bad one."""
    if isinstance(identifiers, str):
        raise InputError(f"expected a list of identifiers, got the text '{identifiers}'; put it in a list")
    found: dict[str, None] = {}
    for text in _texts(identifiers):
        if text in found:
            message = f"expected every identifier once in a request, got '{text}' twice; remove one"
            raise RefusedIdentifier(message, text)
        found[text] = None
    if not found:
        raise InputError("expected at least one identifier in a request, got none; name the examples to forget")
    return list(found)


def _texts(identifiers: Iterable[str | int]) -> Iterator[str]:
    for identifier in identifiers:
        if isinstance(identifier, bool) or not isinstance(identifier, (str, int)):
            raise InputError(f"expected identifiers of type str or int, got {identifier!r}; convert them")
        text = str(identifier)
        if not is_line(text):
            message = f"expected identifiers of printable characters without spaces around them, got {text!r}"
            raise RefusedIdentifier(message, text)
        yield text
