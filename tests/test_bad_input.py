"""Every public callable, called wrongly: the tables of ``bad_input/``."""

from __future__ import annotations

import inspect
import warnings

import pytest
from bad_input import calibration, losses, models, report
from bad_input.table import Target, Wrong, contents
from test_public_api import PUBLIC

TABLE = [*losses.TABLE, *calibration.TABLE, *models.TABLE, *report.TABLE]
TARGETS = list(dict.fromkeys(target for targets, _ in TABLE for target in targets))
CASES = [
    pytest.param(target, wrong, id=f"{target.name}-{'-'.join(wrong.change)}-{row}-{column}")
    for row, (targets, wrongs) in enumerate(TABLE)
    for target in targets
    for column, wrong in enumerate(wrongs)
]


@pytest.mark.parametrize(("target", "wrong"), CASES)
def test_a_wrong_call_says_what_is_wrong_and_changes_nothing(target: Target, wrong: Wrong) -> None:
    """The argument, the rule, what came, the fix; whole messages once a check. Arguments and objects are as before."""
    arguments = {**target.arguments(), **wrong.change}
    before = contents(arguments)
    with pytest.raises(wrong.error) as raised:
        target.call(**arguments)
    assert type(raised.value) is wrong.error
    if wrong.message:
        assert str(raised.value) == wrong.message
    else:
        assert str(raised.value).startswith(tuple(wrong.change))
    assert contents(arguments) == before


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_calls_that_are_spoilt_are_good_ones(target: Target) -> None:
    """So that what is wrong about a case is what the table says."""
    if target.name != "OrthogonalityLoss.__add__":  # which takes nothing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few samples may not determine a temperature
            target.call(**target.arguments())


def test_every_public_callable_is_in_the_table() -> None:
    """But tuples of results, and the base class, whose operators stand for it."""
    tables = {target.name for target in TARGETS}
    for module in PUBLIC:
        path = module.__name__.removeprefix("calrobust").removeprefix(".")
        for name in module.__all__:
            public = getattr(module, name)
            if inspect.ismodule(public) or (isinstance(public, type) and issubclass(public, (tuple, dict))):
                continue
            full = f"{path}.{name}" if path else name
            home = public.__module__.removeprefix("calrobust.")  # losses live in their module and on the roof
            names = {full, name, f"{home}.{name}", f"{home.split('.')[0]}.{name}"}
            assert any(t in names or t.rpartition(".")[0] in names for t in tables), f"{full} has no wrong call"
