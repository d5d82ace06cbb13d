"""A teacher's copy shares nothing with its student, or an error says what stands in the way."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from types import MethodType, SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from calrobust import EMATeacher

INPUTS = torch.ones(2, 3)
FEATURES: dict[str, Tensor] = {}
LAST: Tensor | None = None


def model() -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


class Recorder:
    """Keeps what a layer gave."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        """The hook."""
        self.seen.append(output)

    def hook(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        """The same as a method."""
        self.seen.append(output)


def record_globally(layer: nn.Module, inputs: Any, output: Tensor) -> None:
    """A hook that writes to a global dict."""
    FEATURES["layer"] = output


def closure_in_forward(layer: nn.Module) -> None:
    """The new forward keeps the original one in a closure."""
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def default_in_forward(layer: nn.Module) -> None:
    """The new forward keeps the layer in a default."""
    layer.forward = lambda x, own=layer: x @ own.weight.T


def closure_in_a_method(layer: nn.Module) -> None:
    """The method is bound to the copy, but its inner function is the student's."""
    forward = layer.forward
    layer.forward = MethodType(lambda self, x: 2 * forward(x), layer)


def closure_in_a_partial(layer: nn.Module) -> None:
    """The new forward is a functools.partial of a closure."""
    forward = layer.forward
    layer.forward = partial(lambda factor, x: factor * forward(x), 2)


def closure_in_a_closure(layer: nn.Module) -> None:
    """The captured forward is two functions down, behind a partial."""
    forward = partial(layer.forward)

    def inner(x: Tensor) -> Any:
        return forward(x)

    layer.forward = lambda x: inner(x)


def compiled_forward(layer: nn.Module) -> None:
    """What torch.compile returns holds the student's method."""
    layer.forward = torch.compile(layer.forward)


def another_attribute(layer: Any) -> None:
    """An attribute other than the forward holds the function."""
    layer.scale = lambda x: x * layer.weight.mean()


def closure_in_a_list(layer: Any) -> None:
    """Deepcopy copies the list, but not the function in it."""
    layer.steps = [{"first": lambda x: layer(x)}]


def closure_with_a_holder(layer: Any) -> None:
    """A dict that the closure keeps holds the layer."""
    held = {"layers": (layer,)}
    layer.step = lambda x: held["layers"][0](x)


def cached_method(layer: Any) -> None:
    """Deepcopy does not copy a cache, nor the layer whose method it wraps."""
    layer.cached = lru_cache(layer.extra_repr)


def cached_weight(layer: Any) -> None:
    """Deepcopy does not copy a cache, nor what is in it."""
    name = "weight"
    layer.cached = lru_cache(lambda: getattr(layers[0], name))
    layers: list[Any] = [layer]
    layer.cached()
    layers.clear()


def method_in_c(layer: Any) -> None:
    """Deepcopy does not copy such a method, nor its object."""
    layer.parts = {"weight": layer.weight}.get


def weak_reference(layer: Any) -> None:
    """Deepcopy does not copy weak references."""
    layer.itself = ref(layer)


def closure_in_an_object(layer: Any) -> None:
    """Deepcopy copies the object, but not the function in it."""
    layer.settings = SimpleNamespace(step=lambda x: layer(x))


def captured_by_an_object(layer: nn.Module) -> None:
    """The hook is an object, which is copied, and holds a function, which is not."""
    seen: list[Any] = []
    hook: Any = Recorder()
    hook.then = lambda x: seen.append(x)
    layer.register_forward_hook(hook)


@dataclass(slots=True)
class Slotted:
    """An object without a dict of attributes."""

    held: Any


def closure_in_a_slotted_object(layer: Any) -> None:
    """Deepcopy copies the object, but not the function in it."""
    layer.settings = Slotted(lambda x: layer(x))


def closure_with_a_slotted_holder(layer: Any) -> None:
    """An object that the closure keeps holds the layer."""
    held = Slotted(layer)
    layer.step = lambda x: held.held(x)


def closure_in_a_deque(layer: Any) -> None:
    """Deepcopy copies the deque, but not the function in it."""
    layer.steps = deque([lambda x: layer(x)])


def closure_in_a_frozenset(layer: Any) -> None:
    """The same in a set that cannot change."""
    layer.steps = frozenset([lambda x: layer(x)])


def captured_weight(layer: nn.Module) -> None:
    """A detached weight has the memory of the student's."""
    weight = layer.get_parameter("weight").detach()
    layer.forward = lambda x: x @ weight.T


def captured_state(layer: nn.Module) -> None:
    """So have the tensors of a state dict."""
    state = layer.state_dict()
    layer.forward = lambda x: x @ state["weight"].T


def rebound_variable(layer: nn.Module) -> None:
    """The copy's hook would bind the same variable."""
    seen: Any = None

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal seen
        seen = output

    layer.register_forward_hook(hook)


def rebound_global(layer: nn.Module) -> None:
    """The copy's hook would bind the same global name."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        global LAST
        LAST = output

    layer.register_forward_hook(hook)


def captured_dict(layer: nn.Module) -> None:
    """The copy would fill the same dict."""
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda module, inputs, output: seen.update(output=output))


def captured_list_before(layer: nn.Module) -> None:
    """The hook runs before the layer."""
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))


def captured_recorder(layer: nn.Module) -> None:
    """The hook captures an object of the caller's."""
    recorder = Recorder()
    layer.register_forward_hook(lambda *arguments: recorder(*arguments))


def captured_global(layer: nn.Module) -> None:
    """The hook writes to a global dict."""
    layer.register_forward_hook(record_globally)


@pytest.mark.parametrize(
    "change",
    [
        closure_in_forward,
        default_in_forward,
        closure_in_a_method,
        closure_in_a_partial,
        closure_in_a_closure,
        compiled_forward,
        another_attribute,
        closure_in_a_list,
        closure_with_a_holder,
        cached_method,
        cached_weight,
        method_in_c,
        weak_reference,
        closure_in_an_object,
        captured_by_an_object,
        closure_in_a_slotted_object,
        closure_with_a_slotted_holder,
        closure_in_a_deque,
        closure_in_a_frozenset,
        captured_weight,
        captured_state,
        rebound_variable,
        rebound_global,
        captured_dict,
        captured_list_before,
        captured_recorder,
        captured_global,
    ],
)
def test_a_function_that_captures_what_a_copy_would_share_is_refused_by_name(
    change: Callable[[nn.Module], None],
) -> None:
    """The teacher would run the student's weights, or write over the student's features (trap 38)."""
    student = model()
    change(student[1])
    with pytest.raises(ValueError, match=r"captures what a copy would share, got .* of the Linear '1', which captures"):
        EMATeacher(student)
    EMATeacher(student, copy=model())


def test_an_error_that_a_model_keeps_holds_no_functions_of_it() -> None:
    """Deepcopy leaves its traceback out, whose frames know the student."""
    student: Any = model()

    def fail() -> None:
        raise RuntimeError(student)

    with pytest.raises(RuntimeError) as raised:
        fail()
    student.last_error = raised.value
    student.last_error.args = ()
    copied: Any = EMATeacher(student).module
    assert copied.last_error is not raised.value


def test_a_second_model_whose_functions_hold_the_students_parts_is_refused() -> None:
    """A deepcopy of such a student would run the student's weights too."""
    student, second = model(), model()
    closure_in_forward(student[1])
    for copy in (deepcopy(student), second):
        second[1].forward = student[1].forward
        with pytest.raises(ValueError, match=r"^copy must have no function .* in forward of the Linear '1'"):
            EMATeacher(student, copy=copy)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_copied(kind: Callable[[int, int], nn.Module]) -> None:
    """Their weak references are to their weights, and deepcopy renews them."""
    student = kind(2, 2)
    teacher = EMATeacher(student)
    before = teacher(torch.ones(3, 1, 2))[0]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(0.5)
    assert torch.equal(teacher(torch.ones(3, 1, 2))[0], before)


@pytest.mark.filterwarnings("ignore")  # torch moves this package
def test_models_prepared_for_quantisation_are_copied() -> None:
    """What makes their observers holds functions, which do not run in forward."""
    quantisation = import_module("torch.ao.quantization")
    student = model().train()
    student.qconfig = quantisation.get_default_qat_qconfig("fbgemm")
    student = quantisation.prepare_qat(student)
    student(INPUTS)
    teacher = EMATeacher(student)
    expected = teacher(INPUTS)
    with torch.no_grad():
        student[0].weight.zero_()
    assert torch.equal(teacher(INPUTS), expected)


def scaled(self: nn.Module, x: Tensor) -> Tensor:
    """A forward that is bound to its module."""
    return x @ self.get_parameter("weight").T * 2


def bound_forward(layer: nn.Module) -> None:
    """Deepcopy binds it to the copy."""
    layer.forward = MethodType(scaled, layer)


def partial_forward(layer: nn.Module) -> None:
    """Deepcopy copies the arguments of a partial."""
    layer.forward = partial(scaled, layer)


def harmless_closure(layer: Any) -> None:
    """Numbers and settings are not state, and a recursive function holds itself."""
    factor, options = 2.0, {"depth": 1}

    def act(x: Tensor, depth: int = 0) -> Any:
        return act(x, depth + 1) if depth < options["depth"] else factor * x

    layer.act, layer.steps = act, [act]
    layer.register_forward_hook(lambda module, inputs, output: factor * output)


def hook_of_an_object(layer: nn.Module) -> None:
    """The teacher has a copy of the object."""
    recorder = Recorder()
    layer.register_forward_hook(recorder.hook)
    layer.register_forward_hook(recorder)
    layer.register_forward_hook(partial(Recorder.hook, recorder))


def compiled_in_place(layer: nn.Module) -> None:
    """Torch leaves the compiled function out of copies."""
    layer.compile()


@pytest.mark.parametrize(
    "change", [bound_forward, partial_forward, harmless_closure, hook_of_an_object, compiled_in_place]
)
def test_what_deepcopy_copies_is_taken(change: Callable[[nn.Module], None]) -> None:
    """The copy computes with its own weights, and its hooks write to objects of its own."""
    student = model()
    change(student[1])
    teacher = EMATeacher(student)
    expected = student.get_submodule("1").forward(torch.ones(2, 4))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(teacher.module.get_submodule("1").forward(torch.ones(2, 4)), expected)
    teacher(INPUTS)
    for hook in student[1]._forward_hooks.values():
        assert not getattr(getattr(hook, "__self__", hook), "seen", [])


def test_parameters_without_values_are_refused_by_name() -> None:
    """They are refused when the teacher is made and at an update, which then does not count."""
    for device, message in (("meta", "a meta tensor"), ("cpu", r"an empty tensor of shape \[0\]")):
        student = model()
        teacher = EMATeacher(student)
        student[1].weight = nn.Parameter(torch.empty(0, device=device))
        with pytest.raises(ValueError, match=rf"student's 1\.weight must have values, got {message}"):
            EMATeacher(student)
        with pytest.raises(ValueError, match=rf"student's 1\.weight must have values, got {message}"):
            teacher.update(student)
        assert (teacher.step, teacher.updates) == (0, 0)
    with pytest.raises(ValueError, match="student's weight must have values, got a lazy tensor"):
        EMATeacher(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="teacher's weight must have values, got a meta tensor"):
        EMATeacher(nn.Linear(1, 1), device="meta").update(nn.Linear(1, 1))


class Graph(nn.Linear):
    """Keeps a tensor of the graph."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Keeps its own output."""
        self.last = super().forward(inputs)
        return self.last


def with_graph_tensor() -> nn.Module:
    """A model after a forward pass."""
    student = nn.Sequential(nn.Linear(3, 3), Graph(3, 2))
    student(INPUTS)
    return student


def with_lock() -> nn.Module:
    """A model with an object that neither pickle nor deepcopy takes."""
    student = nn.Sequential(nn.Linear(3, 3), Graph(3, 2))
    student[1].last = threading.Lock()  # type: ignore[assignment]  # the wrong type is the test
    return student


@pytest.mark.parametrize("build", [with_graph_tensor, with_lock])
def test_a_model_that_cannot_be_copied_is_told_by_attribute_and_can_be_given_twice(
    build: Callable[[], nn.Module],
) -> None:
    """The error names the attribute and ``copy=``, whose state becomes the student's."""
    student = build()
    with pytest.raises(TypeError, match=r"got the attribute '1\.last' of a Graph, where it raises .*copy=build_mod"):
        EMATeacher(student)
    teacher = EMATeacher(student, 0.0, copy=nn.Sequential(nn.Linear(3, 3), Graph(3, 2)))
    assert torch.equal(teacher(INPUTS), student(INPUTS))
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert not teacher.module[1].training  # type: ignore[index]  # it is a Sequential
    teacher.update(student)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_a_scripted_student_is_refused() -> None:
    """Its layers are not seen, so that a teacher could not tell statistics from other buffers."""
    expected = "student must be a model in Python, got a ScriptModule; make the teacher before scripting"
    with pytest.raises(TypeError, match=re.escape(expected)):
        EMATeacher(torch.jit.script(model()))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # old weight_norm is deprecated
def test_old_weight_norm_is_taken_by_a_second_model() -> None:
    """Its weight is a tensor of the graph, computed anew at each forward pass."""

    def build() -> nn.Module:
        return nn.utils.weight_norm(nn.Linear(3, 2))

    student = build()
    student(INPUTS)
    with pytest.raises(TypeError, match="'weight' of a Linear"):
        EMATeacher(student)
    assert torch.equal(EMATeacher(student, copy=build())(INPUTS), student(INPUTS))


def test_a_second_model_must_fit_and_be_another() -> None:
    """It has the student's names and shapes, and tensors of its own."""
    student = model()
    with pytest.raises(ValueError, match="must have the same names and shapes"):
        EMATeacher(student, copy=nn.Linear(3, 4))
    for shared in (student, nn.Sequential(student[0], nn.Linear(4, 2))):
        with pytest.raises(ValueError, match="copy must be a model of its own, got one that shares tensors"):
            EMATeacher(student, copy=shared)
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(TypeError, match=r"copy must be of type Module, got str"):
        EMATeacher(student, copy="model")  # type: ignore[arg-type]  # the wrong type is the test


def test_a_compiled_second_model_changes_no_name() -> None:
    """As a compiled student changes none, so that checkpoints fit."""
    student, compiled = model(), model()
    compiled.compile()
    names = EMATeacher(student).state_dict().keys()
    wrapped: Any = torch.compile(model())
    for second in (compiled, wrapped, nn.DataParallel(model())):
        assert EMATeacher(student, copy=second).state_dict().keys() == names


def test_a_low_precision_second_model_gets_masters_and_a_float32_one_needs_none() -> None:
    """The copy's dtype decides."""
    student = model().bfloat16()
    assert EMATeacher(student, copy=model().bfloat16()).masters is not None
    teacher = EMATeacher(student, 0.5, copy=model())
    assert teacher.masters is None
    before = student.get_parameter("0.weight").detach().float()
    nn.init.ones_(student.get_parameter("0.weight"))
    teacher.update(student)
    assert torch.equal(teacher.module.get_parameter("0.weight"), before.lerp(torch.ones_like(before), 0.5))


def test_a_teacher_made_in_inference_mode_can_be_updated_outside() -> None:
    """No update could write to inference tensors."""
    outer = model()
    with torch.inference_mode():
        inner = model()
        teachers = [EMATeacher(outer, 0.5), EMATeacher(inner, 0.5), EMATeacher(inner, 0.5, copy=outer)]
    for teacher in teachers:
        teacher.update(inner)
        with torch.inference_mode():
            teacher.update(inner)
            teacher(INPUTS)
        assert teacher.updates == 2
