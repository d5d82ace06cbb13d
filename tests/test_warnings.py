"""What a warning names, and the line that it points to."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from calrobust import MultimodalContrastiveLoss, PlattScaler, ShiftReport, TemperatureScaler
from calrobust.functional import fit_temperature
from calrobust.integrations.open_clip import OpenClipLoss

SEPARABLE = torch.eye(2), torch.tensor([0, 1])


class Inside(nn.Module):
    """A model that calls a loss itself."""

    loss = OpenClipLoss(MultimodalContrastiveLoss())

    @torch.no_grad()
    def forward(self) -> Any:
        """Torch's functions lie on both sides of the call."""
        return self.loss(*SEPARABLE[:1] * 2, 1.0)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the trainer of open_clip 4."""
    main = SimpleNamespace(create_task=SimpleNamespace(__module__="open_clip.factory"))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", main)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


OF_T, OF_LINE = "the data do not determine a temperature", "the data do not determine a and b: "
CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "fit_temperature": (lambda: fit_temperature(*SEPARABLE), f"{OF_T}: "),
    "TemperatureScaler.fit": (lambda: TemperatureScaler().fit(*SEPARABLE), f"{OF_T}: "),
    "ShiftReport.fit_temperature": (
        lambda: ShiftReport(id_domain="photo").fit_temperature("FT w/ LS", *SEPARABLE),
        f"{OF_T} of 'FT w/ LS': ",
    ),
    "PlattScaler.fit": (lambda: PlattScaler().fit(torch.zeros(2), SEPARABLE[1].bool()), OF_LINE),
    "OpenClipLoss": (
        lambda: OpenClipLoss(Inside.loss.criterion),
        "the trainer of open_clip 4 never calls create_loss; ",
    ),
    "OpenClipLoss.forward": (Inside(), "the criterion contrasts the pairs of each rank alone, "),
}


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("called", CALLS)
def test_a_warning_points_to_the_callers_line_and_names_what_was_called(called: str) -> None:
    """However many functions of ours and of torch's lie between."""
    call, begins = CALLS[called]
    with pytest.warns(UserWarning, match=f"^{re.escape(begins)}") as caught:
        call()
    (warning,) = caught
    assert str(warning.message).endswith(f" ({called})")
    code = inspect.unwrap(Inside.forward if isinstance(call, Inside) else call).__code__
    assert (warning.filename, warning.lineno) in {(code.co_filename, line) for *_, line in code.co_lines()}


@pytest.mark.parametrize(("module", "warned"), [({}, 1), ({"__name__": None}, 0)])
def test_a_warning_may_arise_in_code_without_a_module(module: dict[str, Any], warned: int) -> None:
    """Some runners execute code in such globals. Python itself drops what warns where ``__name__`` is None."""
    space = {**module, "fit": fit_temperature, "data": SEPARABLE}
    exec(compile("def call(): return fit(*data)", "cell", "exec"), space)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert space["call"]() > 0
    assert [one.filename for one in caught] == ["cell"] * warned
