"""EMATeacher: a frozen copy that follows a student."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calrobust._checks import check_fraction, check_module, check_positive_integer, check_same_state


class EMATeacher(nn.Module):
    r"""Frozen copy :math:`\psi` of a student :math:`\theta` that follows it by an exponential moving average.

    .. math:: \psi \leftarrow \alpha\, \psi + (1 - \alpha)\, \theta

    Averaged are the parameters and the persistent buffers of floating (or complex) dtype, so BatchNorm statistics
    too; other persistent buffers are copied from the student. Non-persistent buffers (caches, masks), which a module
    rebuilds for itself, stay those of the copy. :math:`\alpha` honours the very first update: nothing is ever
    copied behind the schedule's back.

    The copy has no gradient, is always in eval mode, and a parent that holds the teacher moves it with ``.to()`` and
    saves it in its ``state_dict`` while ``parent.parameters()`` and ``parent.train()`` do not reach it. A student in
    bfloat16 or float16 is averaged in float32 masters behind the low-precision copy, else a decay near 1 would
    round every move away.

    With FSDP2, make the teacher first; then give ``teacher.module`` (and ``teacher.masters``, if any) the same
    ``fully_shard`` calls as the student, and each rank averages its own shards.

    Args:
        student: the model to copy; wrapped by ``DistributedDataParallel`` or ``torch.compile``, the model inside.
        decay: :math:`\alpha` in ``[0, 1]``, or a callable that gives it for the index ``n = 0, 1, ...`` of the update
            that acts; see :mod:`calrobust.schedules`.
        update_every: :meth:`update` is called once a training step and acts on every ``update_every``-th call.
        device: where to keep the copy; ``None`` means beside the student.

    Attributes:
        module: the copy.
        masters: its float32 twin that does the averaging for a low-precision student, else ``None``.
        step: how many times :meth:`update` was called.
        updates: how many times it acted.

    Raises:
        TypeError: ``student`` is no module, ``update_every`` no int, or ``decay`` neither a number nor callable.
        ValueError: ``decay`` is outside ``[0, 1]``, or ``update_every`` is below 1.

    Example:
        >>> import torch
        >>> from calrobust import EMATeacher
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(student.weight, 1.0)
        >>> teacher = EMATeacher(student, decay=0.75)
        >>> _ = torch.nn.init.constant_(student.weight, 5.0)  # a training step
        >>> teacher.update(student)  # 0.75 * 1 + 0.25 * 5
        >>> teacher(torch.ones(1, 1))
        tensor([[2.]])

    Reference: Oh et al., 2024, :arxiv:`2311.01723`, the teacher of its self-distillation.
    """

    module: nn.Module
    masters: nn.Module | None

    def __init__(
        self,
        student: nn.Module,
        decay: float | Callable[[int], float] = 0.999,
        *,
        update_every: int = 1,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        check_module(student=student)
        if not callable(decay):
            check_fraction(closed=True, decay=decay)
        check_positive_integer(update_every=update_every)
        self.decay = decay
        self.update_every = update_every
        self.step = 0
        self.updates = 0
        self._swapped = False
        module = copy.deepcopy(_unwrap(student)).requires_grad_(False).eval()
        if device is not None:
            module.to(device)
        # Plain attributes, not submodules: what is not registered, no optimiser finds and no train() reaches.
        # `_apply`, `_save_to_state_dict` and `_load_from_state_dict` give back what registration gives besides.
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "masters", _float32_masters(module))
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the copy without gradient, with the arguments and the result of the student's ``forward``."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Counts a training step and, on every ``update_every``-th, moves the copy towards ``student``.

        Args:
            student: the model in training; it may by now be wrapped by ``DistributedDataParallel`` or
                ``torch.compile``: path components ``module`` and ``_orig_mod`` of its names are ignored.

        Raises:
            ValueError: the names or shapes of parameters and persistent buffers are not those of the copy, or the
                schedule gives a decay outside ``[0, 1]``. The copy and the counters are then as before.
            RuntimeError: called inside :meth:`swapped_into`.
        """
        if self._swapped:
            raise RuntimeError("update was called inside swapped_into, where the student holds the teacher's weights")
        acts = (self.step + 1) % self.update_every == 0
        if acts:
            decay = self.decay(self.updates) if callable(self.decay) else self.decay
            check_fraction(closed=True, decay=decay)
            average = self.module if self.masters is None else self.masters
            _average_(_pairs(average, student), 1 - decay)
            if self.masters is not None:
                for value, master in _pairs(self.module, self.masters):
                    value.copy_(master)
            self.updates += 1
        elif self.step == 0:
            _pairs(self.module, student)  # a wrong student is told at the first step, not at the first that acts
        self.step += 1

    @contextmanager
    def swapped_into(self, student: nn.Module) -> Iterator[None]:
        """Lends the averaged weights to the student, to evaluate them inside it; its own come back at the end.

        The values change in place, so wrappers and optimisers stay valid; they are restored bit for bit, also after an
        exception. Train and eval modes are left alone. Takes the memory of one more copy while it lasts.

        Args:
            student: as in :meth:`update`.

        Raises:
            ValueError: the student's names or shapes are not those of the copy.
            RuntimeError: nested use.

        Example:
            >>> import torch
            >>> from calrobust import EMATeacher
            >>> student = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.constant_(student.weight, 1.0)
            >>> teacher = EMATeacher(student)
            >>> _ = torch.nn.init.constant_(student.weight, 5.0)
            >>> with teacher.swapped_into(student):
            ...     print(student.weight.item())
            1.0
            >>> print(student.weight.item())
            5.0
        """
        if self._swapped:
            raise RuntimeError("swapped_into is already active; leave the first block before entering another")
        pairs = _pairs(self.module, student)
        with torch.no_grad():
            saved = [theirs.clone() for _, theirs in pairs]
        self._swapped = True
        try:
            with torch.no_grad():
                for ours, theirs in pairs:
                    theirs.copy_(ours)
            yield
        finally:
            with torch.no_grad():
                for (_, theirs), value in zip(pairs, saved, strict=True):
                    theirs.copy_(value)
            self._swapped = False

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in eval mode, whatever ``mode`` says."""
        return super().train(False)

    def extra_repr(self) -> str:
        """The student's class, the decay and how often it acts."""
        return f"{type(self.module).__name__}, decay={self.decay!r}, update_every={self.update_every}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMATeacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch leaves it untyped
        self.module._apply(fn, recurse)
        if self.masters is None:
            object.__setattr__(self, "masters", _float32_masters(self.module))
        else:

            def keep_dtype(tensor: Tensor) -> Tensor:
                moved = fn(tensor)
                return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

            self.masters._apply(keep_dtype, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for counter in ("step", "updates"):
            destination[prefix + counter] = torch.tensor(getattr(self, counter))
        for name, module in self._held():
            module.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unknown = {key for key in state_dict if key.startswith(prefix)}
        for counter in ("step", "updates"):
            if prefix + counter in state_dict:
                setattr(self, counter, int(state_dict[prefix + counter]))
            else:
                missing_keys.append(prefix + counter)
            unknown.discard(prefix + counter)
        for name, module in self._held():
            start = f"{prefix}{name}."
            inner = {key: value for key, value in state_dict.items() if key.startswith(start)}
            unknown -= inner.keys()
            try:
                keys = module.load_state_dict(
                    {key[len(start) :]: value for key, value in inner.items()},
                    strict=False,  # what is missing or unexpected goes to the caller, who knows whether it is strict
                    assign=local_metadata.get("assign_to_params_buffers", False),
                )
            except RuntimeError as error:
                error_msgs.append(str(error))
            else:
                missing_keys += [start + key for key in keys.missing_keys]
                unexpected_keys += [start + key for key in keys.unexpected_keys]
        unexpected_keys += sorted(unknown)

    def _held(self) -> list[tuple[str, nn.Module]]:
        held = (("module", self.module), ("masters", self.masters))
        return [(name, module) for name, module in held if module is not None]


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``, however nested."""
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, wrappers stripped from the names; tied ones under each name.

    Read anew at every use: optimisers, ``.to()``, ``load_state_dict`` and FSDP may replace any of them at any time.
    Not ``module.state_dict()``, whose hooks may rename, gather or copy.
    """
    state: dict[str, Tensor] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        if reshard := getattr(type(owner), "reshard", None):
            reshard(owner)  # FSDP2's root keeps gathered parameters after a forward pass without a backward one
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or name in owner._non_persistent_buffers_set:
                continue
            parts = [part for part in path.split(".") if part not in ("", "module", "_orig_mod")]
            key = ".".join([*parts, name])
            if key in state:
                raise ValueError(
                    f"two tensors of the {type(module).__name__} are named {key!r} once 'module' and '_orig_mod' are "
                    "stripped from their paths; rename the submodule that is called 'module'"
                )
            state[key] = tensor
    return state


def _pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pairs what bears the same name, each of our tensors once, however many names tie it."""
    check_module(student=theirs)
    teacher, student = _state(ours), _state(theirs)
    check_same_state(teacher=teacher, student=student)
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for name, tensor in teacher.items():
        if pairs.setdefault(id(tensor), (tensor, student[name]))[1] is not student[name]:
            raise ValueError(
                f"{name} is tied to another parameter in the teacher but not in the student; "
                "tie the student's parameters before the teacher copies it, and keep them tied"
            )
    return list(pairs.values())


def _float32_masters(module: nn.Module) -> nn.Module | None:
    """A copy with every low-precision floating tensor in float32, or ``None`` if the module has none."""
    if not any(_is_low_precision(tensor) for tensor in _state(module).values()):
        return None
    masters = copy.deepcopy(module)
    for tensor in _state(masters).values():
        if _is_low_precision(tensor):
            tensor.data = tensor.data.float()
    return masters


def _is_low_precision(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32


def _average_(pairs: list[tuple[Tensor, Tensor]], weight: float) -> None:
    """Moves the first of each pair towards the second, by ``weight`` if it can be averaged, else all the way."""
    groups = defaultdict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
    for ours, theirs in pairs:
        if not (ours.is_floating_point() or ours.is_complex()):
            ours.copy_(theirs)
        elif weight == 0:
            continue  # stays bit for bit, also beside a student that has diverged: 0 * inf would be NaN
        elif not isinstance(ours, nn.Parameter):
            # A buffer may hold infinities, as attention masks do, and inf - inf is NaN: what is equal stays.
            theirs = theirs.to(ours)
            ours.copy_(torch.where(ours == theirs, ours, torch.lerp(ours, theirs, weight)))
        elif ours.device != theirs.device or ours.dtype != theirs.dtype:
            ours.lerp_(theirs.to(ours), weight)  # one at a time, so that one converted tensor is all it needs
        else:
            for tensors, tensor in zip(groups[ours.device, ours.dtype], (ours, theirs), strict=True):
                tensors.append(tensor)
    for teachers, students in groups.values():
        torch._foreach_lerp_(teachers, students, weight)
