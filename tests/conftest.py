"""What every test shares: one torch thread, a fixed seed, and a Hypothesis profile without deadlines."""

import hypothesis
import pytest
import torch

# A deadline on a shared machine fails on the neighbour's load, not on ours.
hypothesis.settings.register_profile("calrobust", deadline=None, derandomize=True)
hypothesis.settings.load_profile("calrobust")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
