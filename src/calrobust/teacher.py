"""A frozen copy that follows a student."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from calrobust._checks import check_flag, check_fraction, check_instance, check_integer
from calrobust._state import (
    Keeping,
    Pair,
    check_model,
    copied,
    filled,
    keeping_dtype,
    paired,
    parts,
    tensors,
    unwrapped,
    write,
)


class EMATeacher(Keeping):
    r"""Frozen copy :math:`\psi` of a student :math:`\theta`, its exponential moving average.

    .. math:: \psi \leftarrow \alpha \psi + (1 - \alpha) \theta

    Parameters and running statistics of normalisation layers are averaged, in float32 or better; the rest is the
    student's (:doc:`/guides/weights`).

    The copy has no gradient and stays in eval mode. ``.to()`` and ``state_dict`` of a parent reach it, ``parameters()``
    and ``train()`` do not.

    Args:
        student: the model, also in a ``DistributedDataParallel`` or compiled.
        decay: :math:`\alpha` in ``[0, 1]``, or a function of ``updates``, as in :mod:`calrobust.schedules`.
        update_every: the copy moves at each ``update_every``-th call of :meth:`update`.
        device: the copy's; by default the student's.
        copy: a second model for the copy, where ``deepcopy`` fails.
        share_frozen: whether the copy uses the student's frozen parameters, which must stay so and are not in the
            ``state_dict``. FSDP2 needs False.

    Attributes:
        module: the copy.
        masters: a float32 copy, averaged for low precision. It follows writes to ``module``, except by ``.data``.
        step, updates: how often :meth:`update` was called, and acted.

    Raises:
        TypeError: an argument has the wrong type, or ``student`` cannot be copied.
        ValueError: an argument is out of range or does not fit, a parameter has no values, or a function of the copy
            would share data with the student.

    Example:
        >>> import torch
        >>> from calrobust import EMATeacher
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(student.weight, 1.0)
        >>> teacher = EMATeacher(student, decay=0.75)
        >>> _ = torch.nn.init.constant_(student.weight, 5.0)  # a training step
        >>> teacher.update(student)
        >>> teacher(torch.ones(1, 1))  # 0.75 * 1 + 0.25 * 5
        tensor([[2.]])

    Reference: Oh et al., 2024, :arxiv:`2311.01723`.
    """

    module: nn.Module
    masters: nn.Module | None
    _kept = ("step", "updates")

    def __init__(
        self,
        student: nn.Module,
        decay: float | Callable[[int], float] = 0.999,
        *,
        update_every: int = 1,
        device: torch.device | str | int | None = None,
        copy: nn.Module | None = None,
        share_frozen: bool = False,
    ) -> None:
        super().__init__()
        check_model(student=student, copy=student if copy is None else copy)
        if isinstance(student, torch.jit.ScriptModule):
            raise TypeError("student must be a model in Python, got a ScriptModule; make the teacher before scripting")
        if not callable(decay):
            check_fraction(closed=True, decay=decay)
        check_integer(1, update_every=update_every)
        check_flag(share_frozen=share_frozen)
        self.decay = decay if callable(decay) else float(decay)
        self.update_every = int(update_every)
        self.step, self.updates, self._swapped = 0, 0, False
        self._seen: list[int] = []
        self._written: list[tuple[int, int]] = []
        self._places: list[tuple[int, int, str, bool]] = []
        named = tensors(student)[0].items() if share_frozen else ()
        self._shared = {name: one for name, one in named if isinstance(one, nn.Parameter) and not one.requires_grad}
        shared = {*self._shared.values()}
        if shared and device is not None and {one.device for one in shared} != {torch.empty(0, device=device).device}:
            fix = "leave out device or share_frozen"
            raise ValueError(f"device must be the student's, whose tensors share_frozen=True uses, got {device}; {fix}")
        with torch.inference_mode(False), torch.no_grad():
            module = copied(_inner(student), shared) if copy is None else filled(_inner(copy), student, shared)
            module.requires_grad_(False).eval()
            self.register_module("module", module)
            self.register_module("masters", _float32_masters(module, shared))
            self._not_finite = _names_not_finite(tensors(module if self.masters is None else self.masters)[0])
            if device is not None:
                self.to(device)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the copy without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Counts a step, and moves the copy if it is its turn.

        Raises:
            ValueError: the student does not fit, a shared parameter is not frozen any more, or the decay is outside
                ``[0, 1]``. Nothing has changed then.
            RuntimeError: inside :meth:`swapped_into`.
        """
        if self._swapped:
            raise RuntimeError("update was called inside swapped_into, where the student holds the teacher's weights")
        compiling = torch.compiler.is_compiling()  # else every step compiles
        with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True) if compiling else nullcontext():
            check_integer(1, update_every=self.update_every)
            acts = (self.step + 1) % self.update_every == 0
            if acts:
                decay = self.decay(self.updates) if callable(self.decay) else self.decay
                check_fraction(closed=True, decay=decay)
            unfrozen = [name for name, parameter in self._shared.items() if parameter.requires_grad]
            if acts or self.step == 0 or unfrozen:
                pairs = self._pairs(student)
                if wrong := unfrozen or [pair.name for pair in pairs if pair.name in self._shared]:
                    raise ValueError(
                        f"student's {wrong[0]} must stay the frozen tensor that share_frozen=True shares, got "
                        f"{'requires_grad=True' if unfrozen else 'another'}; make the teacher anew from this student, "
                        "or with share_frozen=False"
                    )
                if compiling or self._versions() != self._written:
                    self._renew_masters()
                    if not compiling:
                        self._not_finite |= _names_not_finite({pair.name: pair.ours for pair in pairs})
                if self.step == 0:
                    _broadcast(pairs, student)
                if acts:
                    _average_(pairs, 1 - float(decay), self._not_finite)
                    self.updates += 1
                write(self._with_masters())
                self._written = [] if compiling else self._versions()
            self.step += 1

    def _pairs(self, student: nn.Module) -> list[Pair]:
        """By name, then by place until a part is replaced."""
        ours = self.module if self.masters is None else self.masters
        if torch.compiler.is_compiling():
            return paired(ours, student)
        found = parts(ours) + parts(student)
        if [*map(id, found)] == self._seen:
            pairs = [Pair(found[i], found[j], name, averaged) for i, j, name, averaged in self._places]
            if all(pair.ours.shape == pair.theirs.shape for pair in pairs):
                return pairs
        pairs = paired(ours, student)  # FSDP2 may have replaced parameters
        self._seen = [*map(id, parts(ours) + parts(student))]
        place = {one: i for i, one in enumerate(self._seen)}
        self._places = [(place[id(mine)], place[id(theirs)], name, averaged) for mine, theirs, name, averaged in pairs]
        return pairs

    def _with_masters(self) -> list[tuple[Tensor, Tensor]]:
        masters = {} if self.masters is None else tensors(self.masters)[0]
        own = tensors(self.module)[0] if masters else {}
        return [(own[name], master) for name, master in masters.items() if own[name] is not master]

    def _versions(self) -> list[tuple[int, int]]:
        """Each write to the copy changes them."""
        return [(id(t), t.is_inference() or t._version) for t in parts(self.module) if isinstance(t, Tensor)]

    def _renew_masters(self) -> None:
        for own, master in self._with_masters():
            if own.dtype != master.dtype and own.layout == torch.strided:
                own = torch.where(master.to(own) == own, master.to(own.device), own.to(master.dtype))  # keeps digits
            write([(master, own)])

    @contextmanager
    def swapped_into(self, student: nn.Module) -> Iterator[None]:
        """Lends the averaged weights to the student in a ``with`` block.

        A copy of the student's own brings them back bit for bit, also after an exception. Raises as :meth:`update`.
        """
        if self._swapped:
            raise RuntimeError("swapped_into is already active; leave the first block before entering another")
        pairs = paired(self.module, student)
        own = [(pair.theirs, pair.theirs.detach().clone()) for pair in pairs]
        self._swapped = True
        try:
            write([(pair.theirs, pair.ours) for pair in pairs])
            torch.clear_autocast_cache()  # else casts of the old weights stay
            yield
        finally:
            self._swapped = False
            tensors(student)  # drops what FSDP2 gathered
            write(own)
            torch.clear_autocast_cache()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        """The options."""
        shares = ", share_frozen=True" if self._shared else ""
        return f"decay={self.decay!r}, update_every={self.update_every}{shares}"

    # Only `state_dict` sees the copy and its masters.

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """What was added to the teacher."""
        return ((name, child) for name, child in super().named_children() if name not in ("module", "masters"))

    def named_modules(self, memo: Any = None, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The teacher and what was added."""
        memo = set() if memo is None else memo
        hidden = {self.module, self.masters} - memo
        memo |= hidden
        yield from super().named_modules(memo, *args, **kwargs)
        memo -= hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._renew_masters()
        shared = {*self._shared.values()}

        def move(own: Tensor) -> Tensor:
            return own if own in shared else fn(own)

        self.module._apply(move, recurse)
        if self.masters is None:
            self.register_module("masters", _float32_masters(self.module, shared))
        else:
            self.masters._apply(keeping_dtype(move))
            write(self._with_masters())
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise TypeError(
            "DataParallel must wrap a model without a teacher, got an EMATeacher; keep it outside, and run "
            "torch.nn.DataParallel(teacher.module) under torch.no_grad()"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("module", "masters") and value is not self._modules.get(name, value):
            raise AttributeError(
                f"teacher.{name} must stay the module that checkpoints name, got {type(value).__name__}; to compile it "
                f"call teacher.{name}.compile()"
            )
        super().__setattr__(name, value)

    def _shared_by_key(self, prefix: str) -> dict[str, Tensor]:
        shared, owners = {*self._shared.values()}, super().named_modules(prefix=prefix[:-1], remove_duplicate=False)
        named = ((f"{path}.{name}", one) for path, owner in owners for name, one in owner._parameters.items())
        return {key: one for key, one in named if one in shared}

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The state without what is shared."""
        self._renew_masters()
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for key in self._shared_by_key(prefix):
            del state[key]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        shared, module, masters = self._shared_by_key(prefix), f"{prefix}module.", f"{prefix}masters."
        given = [key for key in state_dict if key.startswith(masters)]
        if extra := [key for key in shared if key in state_dict]:
            args[-1].append(
                f"the state must not have what share_frozen=True shares with the student, got {extra[0]} and "
                f"{len(extra) - 1} more; load one that was saved with share_frozen=True"
            )
        state_dict.update(shared)
        start = module if self.masters is None else masters
        if self.masters is None:  # masters have the digits
            state_dict.update({key.replace(masters, module, 1): state_dict.pop(key) for key in given})
        elif not given:
            own = {key: value for key, value in state_dict.items() if key.startswith(module)}
            state_dict.update({key.replace(module, masters, 1): value for key, value in own.items()})
        loaded = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        self._not_finite |= _names_not_finite({name: loaded[key] for name, key in unwrapped(loaded, "state").items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _inner(module: nn.Module) -> nn.Module:
    while isinstance(module, (DistributedDataParallel, nn.DataParallel)) or "_orig_mod" in module._modules:
        module = next(module.children())
    return module


def _names_not_finite(state: dict[str, Any]) -> set[str]:
    return {name for name, value in state.items() if isinstance(value, Tensor) and not value.sum().isfinite()}


def _broadcast(pairs: list[Pair], student: nn.Module) -> None:
    """As DDP did with the student."""
    for module in student.modules():
        if isinstance(module, DistributedDataParallel):
            for pair in pairs:
                value = pair.ours.to(pair.theirs.device).contiguous()
                dist.broadcast(value, group=module.process_group, group_src=0)
                write([(pair.ours, value)])


def _average_(pairs: list[Pair], weight: float, not_finite: set[str]) -> None:
    teachers: list[Tensor] = []
    students: list[Tensor] = []
    for ours, theirs, name, averaged in pairs:
        if not averaged or weight == 1:
            write([(ours, theirs)])
        elif weight == 0:
            continue  # 0 * inf would be NaN
        elif name in not_finite or not isinstance(ours, nn.Parameter):
            theirs = theirs.to(ours)
            finite = ours.isfinite() & theirs.isfinite()
            ours.copy_(torch.where(finite, torch.lerp(ours, theirs, weight), theirs))
        elif ours.device != theirs.device or ours.dtype != theirs.dtype:
            ours.lerp_(theirs.to(ours), weight)  # one at a time: less memory
        else:
            teachers.append(ours)
            students.append(theirs)
    if teachers:
        torch._foreach_lerp_(teachers, students, weight)


def _float32_masters(module: nn.Module, shared: set[nn.Parameter]) -> nn.Module | None:
    own = tensors(module)[0].items()
    low = {name for name, one in own if one.is_floating_point() and one.itemsize < 4 and one not in shared}
    if not low:
        return None
    masters = deepcopy(module, {id(one): one for one in shared})
    for name, one in tensors(masters)[0].items():
        if name in low:
            one.data = one.data.float()
    return masters


class Following:
    """What callbacks share."""

    _scaler: Any = torch.amp.GradScaler(enabled=False)
    _scale = 1.0

    def __init__(self, teacher: EMATeacher, student: nn.Module) -> None:
        check_instance(EMATeacher, "make it with EMATeacher(student)", teacher=teacher)
        check_model(student=student)
        self.teacher, self.student = teacher, student

    def _start(self, model: nn.Module | None, owner: Any) -> None:
        own = {self.student, *self.student.parameters()}
        if model is not None and not own & {*model.modules(), *model.parameters()}:
            came = f"got another {type(self.student).__name__}; make the teacher from that model, without model_init"
            raise ValueError(f"student must be the Trainer's model or a part of it, {came}")
        self._scaler = getattr(owner, "scaler", None) or self._scaler
        self._scale = self._scaler.get_scale()

    def _update(self) -> None:
        before, self._scale = self._scale, self._scaler.get_scale()
        if self._scale >= before:  # else the scaler skipped the step
            self.teacher.update(self.student)


def whole_state(teacher: EMATeacher) -> dict[str, Any]:
    """The state of whole tensors; every rank must call it."""
    state = teacher.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def load_whole_state(teacher: EMATeacher, state: dict[str, Any]) -> None:
    """Loads a whole state."""
    state = dict(state)
    for name, own in teacher.state_dict().items():
        if hasattr(own, "full_tensor") and name in state:
            from torch.distributed.tensor import distribute_tensor

            state[name] = distribute_tensor(state[name].to(own.device), own.device_mesh, own.placements)
    teacher.load_state_dict(state)


def share_first_rank(teacher: EMATeacher) -> None:
    """Gives every rank the new teacher of the first."""
    if teacher.step == 0 and dist.is_available() and dist.is_initialized():
        states = [{key: one.cpu() if isinstance(one, Tensor) else one for key, one in whole_state(teacher).items()}]
        dist.broadcast_object_list(states)
        load_whole_state(teacher, states[0])
