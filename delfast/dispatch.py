"""The base of modes that observe every operation of torch in a context."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class ObservingMode(TorchDispatchMode):
    """A mode that observes operations of higher order too, and the parts of ``flex_attention`` one by one."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: ``flex_attention`` compiles itself, and fails under a mode that does not ignore this."""
        return True
