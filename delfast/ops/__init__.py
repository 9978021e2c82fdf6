"""The ops: one table, a PyTorch reference implementation of each, and native kernels if the extension loads."""

from delfast.ops.native import load_backend

# before any other module of this package: if it raises, the next import of one of them raises the same error
BACKEND = load_backend()

from delfast.ops.table import OPS, define_ops  # noqa: E402

define_ops(BACKEND.module, BACKEND.devices)

__all__ = ["BACKEND", "OPS"]
