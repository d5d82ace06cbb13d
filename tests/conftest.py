"""What every test shares: one torch thread, a fixed seed, a Hypothesis profile without deadlines, and the one skip."""

import hypothesis
import pytest
import torch

# A deadline on a shared machine fails on the neighbour's load, not on ours.
hypothesis.settings.register_profile("calrobust", deadline=None, derandomize=True)
# By hand or at night, with --hypothesis-profile=thorough: other examples each time, and twenty times as many.
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
# For mutation testing, to which it is all one how simple an example is that shows the mutant.
hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
hypothesis.settings.load_profile("calrobust")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The one thing that may be missing is a GPU. Slow tests start first, so that no process is left alone with one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
