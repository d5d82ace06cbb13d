"""EMATeacher: a frozen copy that follows a student."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from calrobust._checks import check_fraction, check_module, check_positive_integer
from calrobust._copying import copied
from calrobust._state import Pair, copy_, paired, reshard, tensors

# Looking for values that are not finite reads every parameter, which costs half an update.
_UPDATES_BETWEEN_SCANS = 64


class EMATeacher(nn.Module):
    r"""Frozen copy :math:`\psi` of a student :math:`\theta` that follows it by an exponential moving average.

    .. math:: \psi \leftarrow \alpha\, \psi + (1 - \alpha)\, \theta

    Parameters and the running statistics of torch's normalisation layers are averaged, every other persistent buffer is
    copied from the student, and a value that is not finite on either side takes the student's. (In parameters such
    values are looked for at the first update and at every 64th, or at each one under ``torch.compile``.)
    Non-persistent buffers stay those of the copy. :math:`\alpha` honours the very first update.

    The copy has no gradient and is always in eval mode. A parent that holds the teacher moves it with ``.to()`` and
    saves it in its ``state_dict``, but ``parent.parameters()`` and ``parent.train()`` do not reach it. A student in
    bfloat16 or float16 is averaged in float32 masters behind the low-precision copy, because a decay near 1 would
    round every move away.

    Hooks of the student are copied too and run in the teacher. A method of an object, or a ``functools.partial``, then
    has a copy of that object or of its arguments. A function that captures what deepcopy would share is refused.

    With DDP, a first :meth:`update` that is given the DDP module takes the copy of the group's first rank, as DDP did
    for the student; every rank must call it. With FSDP2, make the teacher first, then give ``teacher.module`` (and
    ``teacher.masters``, if any) the same ``fully_shard`` calls as the student, and each rank averages its own shards.
    To compile the copy, call ``teacher.module.compile()``.

    Args:
        student: the model to copy; wrapped by ``DistributedDataParallel`` or ``torch.compile``, the model inside.
        decay: :math:`\alpha` in ``[0, 1]``, or a callable that gives it for the index ``n = 0, 1, ...`` of the update
            that acts; see :mod:`calrobust.schedules`.
        update_every: :meth:`update` is called once a training step and acts on every ``update_every``-th call.
        device: where to keep the copy; ``None`` means beside the student.
        copy: a second model to use as the copy, for a student that ``deepcopy`` cannot copy, such as
            ``copy=build_model()``; its parameters and persistent buffers are set to the student's.

    Attributes:
        module: the copy.
        masters: its float32 twin that does the averaging for a low-precision student, else ``None``.
        step: how many times :meth:`update` was called.
        updates: how many times it acted.

    Raises:
        TypeError: ``student`` or ``copy`` is no module, ``update_every`` no int, ``decay`` neither a number nor
            callable, or the student cannot be copied.
        ValueError: ``decay`` is outside ``[0, 1]``, ``update_every`` is below 1, a parameter holds no values (empty,
            lazy, or on the meta device), the copy would share data with the student, or ``copy`` does not fit.

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
        copy: nn.Module | None = None,
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
        self._not_finite: set[str] | None = None  # names of parameters; None: not looked for yet
        with torch.inference_mode(False), torch.no_grad():  # no update could write into inference tensors
            module = copied(_wrapped(student)[-1]) if copy is None else _filled(copy, student)
            module.requires_grad_(False).eval()
            if device is not None:
                module.to(device)
            self.register_module("module", module)
            self.register_module("masters", _float32_masters(module))
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the copy without gradient, with the arguments and the result of the student's ``forward``."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Counts a training step and, on every ``update_every``-th, moves the copy towards ``student``.

        Args:
            student: the model in training; by now it may be wrapped, or have wrapped parts: what
                ``DistributedDataParallel``, ``torch.compile`` and activation checkpointing add to names is ignored.

        Raises:
            ValueError: the names or shapes of parameters and persistent buffers are not those of the copy, a tensor
                holds no values, only one of the two models is sharded, or the schedule gives a decay outside
                ``[0, 1]``. The copy and the counters are then as before.
            RuntimeError: called inside :meth:`swapped_into`.
        """
        if torch.compiler.is_compiling():  # which takes integers of a module for constants, and compiles every step
            with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
                self._update(student)
        else:
            self._update(student)

    def _update(self, student: nn.Module) -> None:
        if self._swapped:
            raise RuntimeError("update was called inside swapped_into, where the student holds the teacher's weights")
        average = self.module if self.masters is None else self.masters
        acts = (self.step + 1) % self.update_every == 0
        if acts:
            decay = self.decay(self.updates) if callable(self.decay) else self.decay
            check_fraction(closed=True, decay=decay)
        if acts or self.step == 0:  # a wrong student is told at the first step, not at the first that acts
            pairs = paired(average, student)
            if self.step == 0:
                _share_first_rank(pairs, student)
        if acts:
            if not torch.compiler.is_compiling() and (
                self._not_finite is None or self.updates % _UPDATES_BETWEEN_SCANS == 0
            ):
                self._not_finite = {p.name for p in pairs if p.averaged and not p.ours.sum().isfinite()}
            _average_(pairs, 1 - float(decay), self._not_finite)
            self.updates += 1
        if self.masters is not None and (acts or self.step == 0):
            for _, value, master, _ in paired(self.module, self.masters):
                copy_(value, master)
        self.step += 1

    @contextmanager
    def swapped_into(self, student: nn.Module) -> Iterator[None]:
        """Lends the averaged weights to the student, to evaluate them inside it; its own come back at the end.

        The values change in place, so wrappers and optimisers stay valid; they are restored bit for bit, also after an
        exception. Train and eval modes are left alone. Takes the memory of one more copy while it lasts.

        Args:
            student: as in :meth:`update`.

        Raises:
            ValueError: as in :meth:`update`.
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
        pairs = paired(self.module, student)
        saved = [pair.theirs.detach().clone() for pair in pairs]
        self._swapped = True
        try:
            with torch.no_grad():
                for pair in pairs:
                    copy_(pair.theirs, pair.ours)
            yield
        finally:
            self._swapped = False
            reshard(student)  # else its next forward pass would use the teacher's weights that FSDP2 gathered
            with torch.no_grad():
                for pair, value in zip(pairs, saved, strict=True):
                    copy_(pair.theirs, value)

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in eval mode, whatever ``mode`` says."""
        return super().train(False)

    def extra_repr(self) -> str:
        """The decay and how often it acts."""
        return f"decay={self.decay!r}, update_every={self.update_every}"

    # The copy and its masters are submodules, which `state_dict` finds by itself. The three methods below hide them
    # from everything else that walks through a parent, and `_apply` reaches them all the same.

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Submodules that were added to the teacher, without the copy."""
        return ((name, child) for name, child in super().named_children() if name not in ("module", "masters"))

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The teacher and what was added to it, without the copy."""
        memo = set() if memo is None else memo
        hidden = {module for module in (self.module, self.masters) if module is not None} - memo
        memo |= hidden
        yield from super().named_modules(memo, prefix, remove_duplicate)
        memo -= hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMATeacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch leaves it untyped
        self.module._apply(fn, recurse)
        if self.masters is None:
            self.register_module("masters", _float32_masters(self.module))
        else:

            def keep_dtype(tensor: Tensor) -> Tensor:
                moved = fn(tensor)
                return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

            self.masters._apply(keep_dtype, recurse)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("_modules", {})
        if name in ("module", "masters") and name in held and value is not held[name]:
            raise AttributeError(
                f"teacher.{name} must stay the module it is, got {type(value).__name__}, which would change the names "
                f"in checkpoints; to compile it, call teacher.{name}.compile()"
            )
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for counter in ("step", "updates"):
            destination[prefix + counter] = torch.tensor(getattr(self, counter))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        *errors: list[str],
    ) -> None:
        state = dict(state_dict)
        self._not_finite = None
        for counter in ("step", "updates"):
            if (value := state.pop(prefix + counter, None)) is None:
                missing_keys.append(prefix + counter)
            else:
                setattr(self, counter, int(value))
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, *errors)


def _wrapped(module: nn.Module) -> list[nn.Module]:
    """The module, and one within the other what DDP, ``DataParallel`` or ``torch.compile`` wrap in it."""
    found = [module]
    while True:
        module = found[-1]
        wraps = isinstance(module, (DistributedDataParallel, nn.DataParallel))
        inner = getattr(module, "module" if wraps else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return found
        found.append(inner)


def _share_first_rank(pairs: list[Pair], student: nn.Module) -> None:
    """Gives every rank the teacher of the first, if the student is wrapped by DDP, which did so for the student."""
    for module in _wrapped(student):
        if isinstance(module, DistributedDataParallel):
            for pair in pairs:
                value = pair.ours.to(pair.theirs.device).contiguous()
                dist.broadcast(value, group=module.process_group, group_src=0)
                copy_(pair.ours, value)


def _average_(pairs: list[Pair], weight: float, not_finite: set[str] | None) -> None:
    """Moves the first of each pair towards the second, by ``weight`` if it is averaged, else all the way."""
    groups = defaultdict(lambda: ([], []))  # type: ignore[var-annotated] # torch.compile traces no subscripted call
    for name, ours, theirs, averaged in pairs:
        if not averaged or weight == 1:
            copy_(ours, theirs)
        elif weight == 0:
            continue  # stays bit for bit, also beside a student that has diverged: 0 * inf would be NaN
        elif not_finite is None or name in not_finite or not isinstance(ours, nn.Parameter):
            theirs = theirs.to(ours)
            finite = ours.isfinite() & theirs.isfinite()
            ours.copy_(torch.where(finite, torch.lerp(ours, theirs, weight), theirs))
        elif ours.device != theirs.device or ours.dtype != theirs.dtype:
            ours.lerp_(theirs.to(ours), weight)  # one at a time, so that one converted tensor is all it needs
        else:
            for tensors_, tensor in zip(groups[ours.device, ours.dtype], (ours, theirs), strict=True):
                tensors_.append(tensor)
    for teachers, students in groups.values():
        torch._foreach_lerp_(teachers, students, weight)


def _float32_masters(module: nn.Module) -> nn.Module | None:
    """A copy with every low-precision floating tensor in float32, or ``None`` if the module has none."""
    if not any(_is_low_precision(tensor) for tensor in tensors(module)[0].values()):
        return None
    masters = deepcopy(module)
    for tensor in tensors(masters)[0].values():
        if _is_low_precision(tensor):
            tensor.data = tensor.data.float()
    return masters


def _is_low_precision(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32


def _filled(copy: nn.Module, student: nn.Module) -> nn.Module:
    """The caller's second model with the student's state."""
    check_module(copy=copy)
    pairs = paired(copy, student)
    if any(pair.ours is pair.theirs for pair in pairs):
        raise ValueError("copy must be a model of its own, got one that shares tensors with the student; build another")
    for pair in pairs:
        copy_(pair.ours, pair.theirs)
    return copy
