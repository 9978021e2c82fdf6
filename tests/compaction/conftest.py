"""The network and the batch of the tests of compaction."""

import pytest
import torch

from tests.compaction.references import Net


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 3, 8, 8, generator=generator), torch.randint(0, 5, (12,), generator=generator)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()
