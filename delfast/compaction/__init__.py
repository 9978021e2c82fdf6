"""Compact training: a masked model that computes, stores and steps only what its mask lets change."""

from delfast.compaction.handle import Compact, Mode, compact

__all__ = ["Compact", "Mode", "compact"]
