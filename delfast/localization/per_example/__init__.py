"""Every example's own gradient, summed as |g| or g² or by channel, in one ordinary backward pass. See
docs/per_example.md.
"""

from delfast.localization.per_example.channels import SignedChannels, signed_channels
from delfast.localization.per_example.sums import PerExampleGradients

__all__ = ["PerExampleGradients", "SignedChannels", "signed_channels"]
