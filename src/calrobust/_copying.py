"""A deep copy of a model that shares nothing with the model, or an error that says what stands in the way."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence, MutableSet
from copy import deepcopy
from functools import partial
from types import CellType, FunctionType, MethodType

from torch import Tensor, nn

from calrobust._state import check_values, tensors

_SECOND_MODEL = "pass a second model: EMATeacher(student, copy=build_model())"
_WRITABLE = (nn.Module, Tensor, MutableMapping, MutableSequence, MutableSet)


def copied(student: nn.Module) -> nn.Module:
    """The deep copy."""
    check_values(student=tensors(student)[0])
    _check_captures(student)
    try:
        return deepcopy(student)
    except Exception as error:
        raise TypeError(
            f"student must be a model that deepcopy can copy, got {_obstacle(student)}, where it raises "
            f"{type(error).__name__} ({error}); {_SECOND_MODEL}"
        ) from error


def _obstacle(student: nn.Module) -> str:
    """The first attribute that cannot be copied, by its path."""
    for path, owner in student.named_modules():
        own = {**vars(owner), **owner._parameters, **owner._buffers}
        for name in own.keys() - {"_modules", "_parameters", "_buffers"}:
            try:
                deepcopy(own[name])
            except Exception:
                return f"the attribute {'.'.join(filter(None, (path, name)))!r} of a {type(owner).__name__}"
    return f"a {type(student).__name__}"


def _check_captures(student: nn.Module) -> None:
    """Raises ``ValueError`` for functions through which a copy would run or fill what is the student's."""
    parts = {id(part) for part in (*student.modules(), *student.parameters(), *student.buffers())}
    for path, owner in student.named_modules():
        hooks = [*owner._forward_hooks.values(), *owner._forward_pre_hooks.values()]
        attributes = {} if "_orig_mod" in owner._modules else dict(vars(owner))  # torch.compile makes its own anew
        attributes.pop("_compiled_call_impl", None)  # likewise
        for what, function in [*(("a hook", hook) for hook in hooks), *attributes.items()]:
            for value in _captured(function):
                if id(value) in parts or (function in hooks and _may_be_filled(value)):
                    raise ValueError(
                        f"student must have no function that captures what a copy would share, got {what} of the "
                        f"{type(owner).__name__} {path!r}, which captures a {type(value).__name__}; make it a method "
                        f"of an object, which is copied, or add a hook after the teacher is made, or {_SECOND_MODEL}"
                    )


def _captured(function: object) -> list[object]:
    """What a function refers to in its closure, defaults and globals, which deepcopy shares instead of copying."""
    while isinstance(function, (partial, MethodType)):  # whose arguments and object are copied
        function = function.func if isinstance(function, partial) else function.__func__
    found = [function]
    for value in found:  # which grows meanwhile
        new: list[object] = []
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            known = (value.__globals__.get(name) for name in value.__code__.co_names)
            new += [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            new += [one for one in known if isinstance(one, (*_WRITABLE, MethodType))]
        elif isinstance(value, MethodType):
            new += [value.__func__, value.__self__]
        elif isinstance(value, partial):
            new += [value.func, *value.args, *value.keywords.values()]
        found += [one for one in new if all(one is not other for other in found)]
    return found[1:]


def _may_be_filled(value: object) -> bool:
    """Whether a hook may write to it; torch's own objects, such as meshes, are taken for settings."""
    home = type(value).__module__.split(".")[0]
    return isinstance(value, _WRITABLE) or not (isinstance(value, type) or home in ("builtins", "functools", "torch"))
