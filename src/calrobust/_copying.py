"""The teacher's copy of a student. They share nothing else than asked, or an error says what stands in the way."""

from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from copy import deepcopy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from calrobust._checks import check_instance
from calrobust._state import check_values, paired, tensors, write

_FIX = "pass a second model: EMATeacher(student, copy=build_model())"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TORCHS = {*vars(nn.Module()), "_compiled_call_impl"}.difference(_HOOKS)  # no function in these runs in a teacher
_WRITABLE = (nn.Module, Tensor, MutableMapping, MutableSequence, MutableSet)


def copied(student: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """A deep copy of the student, which takes over what is ``shared``, by its id, as it is."""
    check_values(student=tensors(student)[0])
    _check_functions(student)
    try:
        return deepcopy(student, shared.copy())
    except Exception as error:
        raise TypeError(
            f"student must be a model that deepcopy can copy, got {_obstacle(student)}, where it raises "
            f"{type(error).__name__} ({error}); {_FIX}"
        ) from error


def filled(copy: nn.Module, student: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """The caller's second model with the student's state, of which it takes over what is ``shared`` as it is."""
    check_instance(nn.Module, "pass a model like the student", copy=copy)
    pairs = paired(copy, student)
    if {*map(id, tensors(copy)[0].values())} & {*map(id, tensors(student)[0].values())}:
        raise ValueError("copy must be a model of its own, got one that shares tensors with the student; build another")
    replaced = {id(pair.ours): shared[id(pair.theirs)] for pair in pairs if id(pair.theirs) in shared}
    for owner in copy.modules():
        owner._parameters.update({n: replaced[id(p)] for n, p in owner._parameters.items() if id(p) in replaced})
    write([(pair.ours, pair.theirs) for pair in pairs])
    return copy


def _obstacle(student: nn.Module) -> str:
    """The first attribute that cannot be copied, by its path."""
    for path, owner in student.named_modules():
        for name, value in {**vars(owner), **owner._parameters, **owner._buffers}.items():
            try:
                deepcopy(None if name in ("_modules", "_parameters", "_buffers") else value)
            except Exception:
                return f"the attribute {f'{path}.{name}'.lstrip('.')!r} of a {type(owner).__name__}"
    return f"a {type(student).__name__}"


def _check_functions(student: nn.Module) -> None:
    """Raises ``ValueError`` for a function through which the copy would run, or write to, what is the student's."""
    parts = {id(part) for part in (*student.modules(), *student.parameters(), *student.buffers())}
    for path, owner in student.named_modules():
        skipped = vars(owner) if "_orig_mod" in owner._modules else _TORCHS  # torch.compile makes its own anew
        for name in vars(owner).keys() - skipped:
            for value in _captured(vars(owner)[name], set()):
                if id(value) in parts or (name in _HOOKS and _may_be_written_to(value)):
                    raise ValueError(
                        f"student must have no function that captures what a copy would share, got one in {name} of "
                        f"the {type(owner).__name__} {path!r}, which captures a {type(value).__name__}; make it a "
                        f"method of an object, which is copied, or add a hook after the teacher is made, or {_FIX}"
                    )


def _captured(value: object, seen: set[tuple[int, bool]], captured: bool = False) -> Iterator[object]:
    """What is reached through functions, which deepcopy does not copy; it copies containers, methods and partials."""
    if (id(value), captured) in seen:
        return
    seen.add((id(value), captured))
    if captured:
        yield value
    held: Iterable[object] = ()
    if isinstance(value, FunctionType):
        captured = True
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        held = (*cells, *defaults, *(one for one in named if isinstance(one, (*_WRITABLE, MethodType))))
    elif isinstance(value, MethodType):
        held = (value.__func__, value.__self__)
    elif isinstance(value, partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (list, tuple, set, dict)):
        held = value.values() if isinstance(value, dict) else value
    for one in held:
        yield from _captured(one, seen, captured)


def _may_be_written_to(value: object) -> bool:
    """Whether a hook may keep something in it. Torch's own objects, such as meshes, are taken for settings."""
    home = type(value).__module__.split(".")[0]
    return isinstance(value, _WRITABLE) or not (isinstance(value, type) or home in ("builtins", "functools", "torch"))
