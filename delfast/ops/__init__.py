"""The ops: one table, a PyTorch reference of each, and native kernels if the extension loads."""

from delfast.ops.native import load_backend
from delfast.ops.table import OPS, define_ops

BACKEND = load_backend()
define_ops(BACKEND.devices)

__all__ = ["BACKEND", "OPS"]
