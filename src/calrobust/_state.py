"""The state of a module by name: which tensors of two models belong together, and which of them are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from calrobust._checks import check_module, check_same_state

# What DDP, torch.compile, activation checkpointing and FSDP1 add to the path of a tensor.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrapped(names: Iterable[str], owner: str) -> dict[str, str]:
    """Maps the names without the path components of wrappers to the names as they are."""
    own: dict[str, str] = {}
    for name in names:
        *path, last = name.split(".")
        key = ".".join([*(part for part in path if part not in _WRAPPERS), last])
        if key in own:
            raise ValueError(
                f"two tensors of the {owner} are named {key!r} once the wrappers' words, such as 'module' and "
                "'_orig_mod', are stripped from their paths; rename the submodule that is called 'module'"
            )
        own[key] = name
    return own


def tensors(module: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Parameters and persistent buffers by unwrapped name, and the names of those that are averaged.

    Tied tensors appear under each of their names. The tensors are read anew at every use: optimisers, ``.to()``,
    ``load_state_dict`` and FSDP may replace any of them. ``module.state_dict()`` would not do, since its hooks may
    rename, gather or copy.
    """
    reshard(module)
    found: dict[str, Tensor] = {}
    statistics: set[str] = set()
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and name not in owner._non_persistent_buffers_set:
                found[prefix + name] = tensor
        if isinstance(owner, _NormBase):
            statistics |= {f"{prefix}running_mean", f"{prefix}running_var"}
    own = unwrapped(found, type(module).__name__)
    averaged = {
        key
        for key, name in own.items()
        if (isinstance(found[name], nn.Parameter) or name in statistics)
        and (found[name].is_floating_point() or found[name].is_complex())
    }
    return {key: found[name] for key, name in own.items()}, averaged


def reshard(module: nn.Module) -> None:
    """Makes FSDP2 drop gathered parameters, which its root keeps after a forward pass without a backward one."""
    for owner in module.modules():
        if method := getattr(type(owner), "reshard", None):
            method(owner)


class Pair(NamedTuple):
    """A tensor of the teacher, the student's of the same name, and whether they are averaged."""

    name: str
    ours: Tensor
    theirs: Tensor
    averaged: bool


def paired(ours: nn.Module, theirs: nn.Module) -> list[Pair]:
    """Pairs what bears the same name, each of our tensors once, however many names tie it."""
    check_module(student=theirs)
    (teacher, averaged), (student, _) = tensors(ours), tensors(theirs)
    check_values(teacher=teacher, student=student)
    check_same_state(teacher=teacher, student=student)
    pairs: dict[int, Pair] = {}
    for name, tensor in teacher.items():
        pair = pairs.setdefault(id(tensor), Pair(name, tensor, student[name], name in averaged))
        if pair.theirs is not student[name]:
            raise ValueError(
                f"{name} is tied to another parameter in the teacher but not in the student; "
                "tie the student's parameters before the teacher copies it, and keep them tied"
            )
        sharded = ["sharded" if hasattr(one, "full_tensor") else "whole" for one in (tensor, student[name])]
        if sharded[0] != sharded[1]:
            raise ValueError(
                f"teacher and student must be sharded alike, got {name} {sharded[0]} in the teacher and {sharded[1]} "
                "in the student; give teacher.module and teacher.masters the fully_shard calls of the student"
            )
    return list(pairs.values())


def check_values(**states: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for a tensor that has a name but no values yet, or not here."""
    for model, state in states.items():
        for name, tensor in state.items():
            if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
                kind, fix = "a lazy one", "run a batch through the model first"
            elif tensor.is_meta:
                kind, fix = "one on the meta device", "load or initialise the model first"
            elif isinstance(tensor, nn.Parameter) and tensor.numel() == 0:
                kind = f"an empty one of shape {list(tensor.shape)}"
                fix = "DeepSpeed ZeRO-3 must gather its placeholders first, which ZeRO-2 does not have"
            else:
                continue
            raise ValueError(f"{model}'s {name} must be a tensor with values, got {kind}; {fix}")


def copy_(target: Tensor, source: Tensor) -> None:
    """Copies in place; of an expanded tensor, into which torch refuses to write, the elements that it has in memory."""
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim] > 1:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)
