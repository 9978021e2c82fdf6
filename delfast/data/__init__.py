"""The data sets of the paper and the user's own, held in memory; batches; forget sets."""

from delfast.data.batches import Batches, Examples, resident
from delfast.data.forget import ForgetSet, choose, parse_forget
from delfast.data.images import ImageData, check_source, load, subset

__all__ = [
    "Batches",
    "Examples",
    "ForgetSet",
    "ImageData",
    "check_source",
    "choose",
    "load",
    "parse_forget",
    "resident",
    "subset",
]
