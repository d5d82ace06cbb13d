"""A model's state, read at each use, since FSDP replaces tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from copy import deepcopy
from dis import get_instructions
from functools import _lru_cache_wrapper
from gc import get_referents
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from calrobust._checks import check_instance, check_not_meta

EXTRA = "_extra_state"
# Of DDP, torch.compile, activation checkpointing and FSDP1.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrapped(names: Mapping[str, Any], owner: str) -> dict[str, str]:
    own = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in names}
    if len(own) < len(names):
        raise ValueError(
            f"names in the {owner} must differ without the words of wrappers, such as 'module' and '_orig_mod', got "
            f"{len(names) - len(own)} that do not; rename the submodule 'module'"
        )
    return own


def tensors(module: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Parameters and persistent buffers by unwrapped name, and the names to average."""
    found: dict[str, tuple[Tensor, bool]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        if method := getattr(type(owner), "reshard", None):
            method(owner)  # FSDP2 may have kept gathered parameters
        normalises = isinstance(owner, nn.modules.batchnorm._NormBase)
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and name not in owner._non_persistent_buffers_set:
                moves = isinstance(tensor, nn.Parameter) or (normalises and name in ("running_mean", "running_var"))
                averaged = moves and (tensor.is_floating_point() or tensor.is_complex())
                found[f"{path}.{name}" if path else name] = tensor, averaged
    own = unwrapped(found, type(module).__name__)
    return {key: found[name][0] for key, name in own.items()}, {key for key, name in own.items() if found[name][1]}


def parts(module: nn.Module) -> list[Any]:
    modules: list[Any] = [module]
    found: list[Any] = []
    for one in modules:
        if isinstance(one, nn.Module):
            modules += one._modules.values()
            found += one._parameters.values() if one._parameters else ()
            found += one._buffers.values() if one._buffers else ()
    return modules + found


class Pair(NamedTuple):
    ours: Tensor
    theirs: Tensor
    name: str
    averaged: bool


def paired(ours: nn.Module, theirs: nn.Module) -> list[Pair]:
    """Pairs by name, without tensors that both models hold."""
    check_model(student=theirs)
    (teacher, averaged), (student, _) = tensors(ours), tensors(theirs)
    check_values(teacher=teacher, student=student)
    check_same_state(teacher=teacher, student=student)
    pairs: dict[int, Pair] = {}
    for name, own in teacher.items():
        if own is student[name]:
            continue
        pair = pairs.setdefault(id(own), Pair(own, student[name], name, name in averaged))
        if pair.theirs is not student[name]:
            raise ValueError(
                f"{name} is tied to another parameter in the teacher but not in the student; tie the student's "
                "parameters before the teacher copies it, and keep them tied"
            )
        mine, other = ("sharded" if hasattr(type(one), "full_tensor") else "whole" for one in (own, student[name]))
        if mine != other:
            raise ValueError(
                f"teacher and student must be sharded alike, got {name} {mine} in the teacher and {other} in the "
                "student; give teacher.module and teacher.masters the fully_shard calls of the student"
            )
    return list(pairs.values())


def check_same_state(**states: Mapping[str, Any]) -> None:
    first, second = states
    ours, theirs = (
        {name: [] if name.endswith(EXTRA) else list(value.shape) for name, value in state.items()}
        for state in states.values()
    )
    wrong = {
        "missing from": [name for name in ours if name not in theirs],
        "unexpected in": [name for name in theirs if name not in ours],
        "of another shape in": [
            f"{name} {theirs[name]} for {shape}" for name, shape in ours.items() if theirs.get(name, shape) != shape
        ],
    }
    found = ""
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found += f"; {what} {second}: {', '.join(names[:3])}{more}"
    if found:
        fix = "are they one architecture, with the same adapters?"
        if {"step", "updates"} <= ours.keys() ^ theirs.keys():
            fix = "is one the state of an EMATeacher? pass teacher.module"
        raise ValueError(f"{first} and {second} must have the same names and shapes{found}; {fix}")


def check_values(**states: Mapping[str, Tensor]) -> None:
    for model, state in states.items():
        for name, tensor in state.items():
            check_not_meta(**{f"{model}'s {name}": tensor})
            if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
                kind, fix = "a lazy tensor", "run a batch through the model first"
            elif isinstance(tensor, nn.Parameter) and tensor.numel() == 0:
                kind, fix = f"an empty tensor of shape {list(tensor.shape)}", "use DeepSpeed's ZeRO-2, not ZeRO-3"
            else:
                continue
            raise ValueError(f"{model}'s {name} must have values, got {kind}; {fix}")


@torch.no_grad()
def write(pairs: Iterable[tuple[Tensor, Tensor, *tuple[Any, ...]]]) -> None:
    for target, source, *_ in pairs:
        for dim, stride in enumerate(target.stride() if target.layout == torch.strided else ()):
            if stride == 0 and target.shape[dim] > 1:  # expanded
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
        target.copy_(source)


_FIX = "pass a second model: EMATeacher(student, copy=build_model())"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# No function in these runs.
_TORCHS = {*vars(nn.Module()), "_compiled_call_impl", "_flat_weight_refs", "qconfig", "meta"}.difference(_HOOKS)
_WRITABLE = (nn.Module, Tensor, MutableMapping, MutableSequence, MutableSet)


class Keeping(nn.Module):
    """Saves the attributes ``_kept``, which as buffers would make the CPU wait."""

    _kept: tuple[str, ...]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._kept:
            destination[prefix + name] = torch.tensor(getattr(self, name))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._kept:
            if (value := state_dict.pop(prefix + name, None)) is None:
                args[2].append(prefix + name)  # missing names
            else:
                setattr(self, name, type(getattr(self, name))(value))
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_model(**models: Any) -> None:
    check_instance(nn.Module, "pass the model itself", **models)
    for name, model in models.items():
        if isinstance(model, Keeping) and "module" in model._modules:  # an EMATeacher
            raise TypeError(f"{name} must be the model itself, got an {type(model).__name__}; pass its .module")


def keeping_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda own: moved if (moved := move(own)).dtype == own.dtype else own.to(moved.device)


def copied(student: nn.Module, shared: set[nn.Parameter]) -> nn.Module:
    check_values(student=tensors(student)[0])
    _check_functions(student, student)
    try:
        return deepcopy(student, {id(one): one for one in shared})
    except Exception as error:
        raise TypeError(
            f"student must be a model that deepcopy can copy, got {_obstacle(student)}, where it raises "
            f"{type(error).__name__} ({error}); {_FIX}"
        ) from error


def filled(copy: nn.Module, student: nn.Module, shared: set[nn.Parameter]) -> nn.Module:
    pairs = paired(copy, student)
    if {*tensors(copy)[0].values()} & {*tensors(student)[0].values()}:
        raise ValueError("copy must be a model of its own, got one that shares tensors with the student; build another")
    _check_functions(copy, student)
    replaced: dict[Any, Any] = {pair.ours: pair.theirs for pair in pairs if pair.theirs in shared}
    for owner in copy.modules():
        owner._parameters.update({name: replaced.get(own, own) for name, own in owner._parameters.items()})
    write(pairs)
    return copy


def _obstacle(student: nn.Module) -> str:
    for path, owner in student.named_modules():
        for name, value in {**vars(owner), **owner._parameters, **owner._buffers}.items():
            try:
                deepcopy(None if name in ("_modules", "_parameters", "_buffers") else value)
            except Exception:
                return f"the attribute {f'{path}.{name}'.lstrip('.')!r} of a {type(owner).__name__}"
    return f"a {type(student).__name__}"


def _check_functions(model: nn.Module, student: nn.Module) -> None:
    own = set().union(*map(_addresses, (*student.modules(), *student.parameters(), *student.buffers()))) - {0}
    for path, owner in model.named_modules():
        skipped = vars(owner) if "_orig_mod" in owner._modules else _TORCHS
        for name in vars(owner).keys() - skipped:
            for value in _captured(vars(owner)[name], set()):
                # Torch's own objects are taken for settings.
                home = type(value).__module__.split(".")[0]
                settings = isinstance(value, type) or home in ("builtins", "functools", "torch")
                writes = name in _HOOKS and model is student and (isinstance(value, _WRITABLE) or not settings)
                if writes or own & _addresses(value):
                    raise ValueError(
                        f"{'student' if model is student else 'copy'} must have no function that captures what a copy "
                        f"would share, got one in {name} of the {type(owner).__name__} {path!r}, which captures a "
                        f"{type(value).__name__}; make it a method of an object, which is copied, or add hooks after "
                        f"the teacher is made, or {_FIX}"
                    )


def _addresses(part: object) -> set[int]:
    return {id(part), part.data_ptr() if isinstance(part, Tensor) and part.layout == torch.strided else 0}


def _captured(value: object, seen: set[tuple[int, bool]], captured: bool = False) -> Iterator[object]:
    """What functions hold, which deepcopy does not copy."""
    if (id(value), captured) in seen:
        return
    seen.add((id(value), captured))
    if captured:
        yield value
    held: Iterable[object] = ()
    if isinstance(value, FunctionType):
        captured, code = True, value.__code__
        stores = (one for one in get_instructions(code) if one.opname in ("STORE_GLOBAL", "STORE_DEREF"))
        if any(one.argval not in code.co_cellvars for one in stores):
            yield value.__globals__  # which it changes, or its cells
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())
        named = (value.__globals__.get(name) for name in code.co_names)
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        held = (*cells, *defaults, *(one for one in named if isinstance(one, (*_WRITABLE, MethodType))))
    elif isinstance(value, ref):
        captured, held = True, (value(),)
    elif not isinstance(value, (nn.Module, Tensor, type, ModuleType, TracebackType)):
        captured = captured or isinstance(value, (BuiltinFunctionType, _lru_cache_wrapper))
        held = get_referents(value)
    for one in held:
        yield from _captured(one, seen, captured)
