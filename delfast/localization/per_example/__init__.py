"""Per-example gradients from one ordinary backward pass, summed as |g|, as g² or by channel.

``docs/per_example.md`` explains the method. Read top-down: ``sums`` and ``channels`` are consumers of ``passes``, the
engine, which runs each batch by a ``batch.BatchRun``. ``trial``, ``trace`` and ``comparison`` find the axis of the
examples. ``capture`` taps the layers; ``rules``, ``contributions`` and ``free`` compute what each use of a parameter
contributes.
"""

from delfast.localization.per_example.channels import SignedChannels, signed_channels
from delfast.localization.per_example.sums import PerExampleGradients

__all__ = ["PerExampleGradients", "SignedChannels", "signed_channels"]
