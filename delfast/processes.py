"""Processes that work on one job together: their groups, what they exchange, and the error that all of them raise.

The data group is the one over which the data differ. The mesh groups are those over which the parameters' meshes lay
parameters out: one group for each dimension of a mesh.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from delfast.bits import checksum
from delfast.errors import InputError
from delfast.groups import (
    Group,
    all_reduce,
    check_group,
    exchanged_device,
    listed,
    mesh_groups,
    meshes_of,
    ranks_of,
    reduced_over,
)
from delfast.joint_errors import (
    TEXT_BYTES,
    at_once_in_forward,
    contexts,
    encoded,
    forget_marks,
    is_exchanged,
    is_inside,
    raised_by_all,
    raised_by_one,
    refuse,
)
from delfast.sharding import forget_forward, fsdp_groups, fsdp_modules, is_dtensor, is_laid_out, local_part

NO_BATCH: Any = object()  # in place of a batch for a process that has none left; None may be a loader's batch


class Processes:
    """The processes of a job, as seen from this process.

    data: the data group, or None if the data are the same everywhere.
    rank: this process's rank in the data group.
    size: the number of processes in the data group.
    meshes: the mesh groups of more than one process, each once.

