"""Compact training: compute, store and step only the elements that a mask selects."""

from delfast.compaction.handle import Compact, Mode, compact

__all__ = ["Compact", "Mode", "compact"]
