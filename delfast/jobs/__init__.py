"""Job files: a Python file of the user's that defines a network, its data and its training."""

from delfast.jobs.job import Job, read_job
from delfast.jobs.values import Accept, Training

__all__ = ["Accept", "Job", "Training", "read_job"]
