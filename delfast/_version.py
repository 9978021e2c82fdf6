"""The version, in this place alone: the package imports it, the build reads it without importing."""

__version__ = "0.3.0"
