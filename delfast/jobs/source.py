"""A job file as a module: executed from the bytes that were read, its errors named by file and line."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

from delfast.arguments import describe
from delfast.errors import InputError, one_line
from delfast.files import reason
from delfast.jobs.modules import prepare_imports

ADVICE = "correct the job file"


class Source:
    """The module of a job file, and the line that each of its names was defined in."""

    def __init__(self, path: Path) -> None:
        """Read and execute the file. InputError, with file and line, if that fails."""
        self.path = path
        content = self._read()
        self.digest = hashlib.sha256(content).hexdigest()
        self._lines: dict[str, int] = {}
        code = self._compile(content)
        # A name of its own in sys.modules: dataclasses and pickle look up the module of a class there. The path is part
        # of the name, since two files of the same content differ by their own path.
        unique = hashlib.sha256(str(path).encode("utf-8", "surrogateescape") + content).hexdigest()[:16]
        prepare_imports(path)
        self.module = ModuleType(f"delfast_job_{unique}")
        self.module.__file__ = str(path)
        sys.modules[self.module.__name__] = self.module
        try:
            with self.naming_errors():
                exec(code, self.module.__dict__)
        except BaseException:
            del sys.modules[self.module.__name__]
            raise

    def _read(self) -> bytes:
        try:
            if not self.path.is_file():
                raise InputError(f"expected a job file at '{self.path}', there is none; `delfast init-job` writes one")
            return self.path.read_bytes()
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read the job file '{self.path}': {reason(error)}") from None

    def _compile(self, content: bytes) -> Any:
        try:
            tree = ast.parse(content, str(self.path))
            code = compile(content, str(self.path), "exec", dont_inherit=True)
        except SyntaxError as error:
            raise InputError(f"{self._at(error.lineno)}: {error.msg}; {ADVICE}") from error
        except (ValueError, RecursionError, MemoryError) as error:  # null bytes, expressions nested too deeply
            raise InputError(f"{self._at(None)}: {one_line(error)}; {ADVICE}") from error
        for statement in tree.body:
            self._lines.update(dict.fromkeys(_bound_names(statement), statement.lineno))
        return code

    def get(self, name: str, default: Any) -> Any:
        """Return the value of a name of the module, or the default."""
        return getattr(self.module, name, default)

    def place(self, name: str) -> str:
        """Return the file, and the line where ``name`` is defined, as the beginning of a message."""
        return self._at(self._lines.get(name))

    def _at(self, line: int | None) -> str:
        return f"'{self.path}'" if line is None else f"'{self.path}', line {line}"

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Begin the message of an InputError inside the context with the file and the line of ``name``."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.place(name)}: {error}") from None

    def function(self, name: str) -> Callable[..., Any] | None:
        """Return the job's function of this name; None without one. InputError for anything that cannot be called."""
        found: Callable[..., Any] | None = self.get(name, None)
        if found is not None and not callable(found):
            raise InputError(f"{self.place(name)}: expected {name} to be a function, got {describe(found)}; {ADVICE}")
        return found

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the job's function of this name. InputError, with file and line, for every exception that it raises."""
        function = self.function(name)
        if function is None:
            raise InputError(f"{self.place(name)}: expected a function {name}(), there is none; define it")
        try:
            with self.naming_errors():
                return function(*arguments)
        except InputError as error:
            if str(error).startswith(self._at(None)):
                raise
            raise InputError(f"{self.place(name)}: {error}") from error
        except Exception as error:  # raised before the first line of the function: by its arguments
            raise InputError(f"{self.place(name)}: {_text(error)}; {ADVICE}") from error

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Turn an exception that a line of the job file raised, or passed on, into an InputError with that line.

        Exceptions of other code, and InputErrors, which state what to do, pass unchanged.
        """
        try:
            yield
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            lines = [line for frame, line in walk_tb(error.__traceback__) if self._is_own(frame.f_code.co_filename)]
            if not lines:
                raise
            raise InputError(f"{self._at(lines[-1])}: {_text(error)}; {ADVICE}") from error

    def _is_own(self, file_name: str) -> bool:
        return file_name == str(self.path)


def _text(error: BaseException) -> str:
    """Return type and first line of an exception."""
    kind, text = type(error).__name__, one_line(error)
    return kind if text == kind else f"{kind}: {text}"


def _bound_names(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for node in (node for target in targets for node in ast.walk(target)):
            if isinstance(node, ast.Name):
                yield node.id
