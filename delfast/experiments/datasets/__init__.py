"""The data sets of the paper and the user's own, held in memory; batches; forget sets."""

from delfast.experiments.datasets.batches import Batches, Examples, resident
from delfast.experiments.datasets.forget import ForgetSet, choose, parse_forget
from delfast.experiments.datasets.images import ImageData, check_source, load, subset

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
