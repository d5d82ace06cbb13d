"""Wrong calls of what holds, moves or combines weights, and of what runs a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from bad_input.table import Odd, Table, Target, Wrong
from torch import Tensor, nn

from calrobust import EMATeacher, average, collect_logits, interpolate, model_stock, schedules, zero_shot_classifier


def weights(**more: Tensor) -> dict[str, Tensor]:
    """A small state dict."""
    return {"w": torch.ones(2, 3), "n": torch.tensor(3), **more}


class Lengths(nn.Module):
    """A text tower that gives its tokens back."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Texts ``[N, 2]``."""
        return tokens


def named_texts() -> dict[str, Any]:
    """A text tower, its tokenizer and two names."""
    return {
        "model": Lengths(),
        "tokenizer": lambda texts: torch.tensor([[3.0, len(text)] for text in texts]),
        "names": ["ox", "gnat"],
        "templates": "{}",
    }


def followed() -> dict[str, Any]:
    """A teacher and its student, which has moved."""
    student = nn.Linear(3, 2)
    teacher = EMATeacher(student, 0.9)
    nn.init.ones_(student.weight)
    return {"teacher": teacher, "student": student}


def swap(teacher: EMATeacher, student: Any) -> None:
    """Enters and leaves the block."""
    with teacher.swapped_into(student):
        pass


def update(teacher: EMATeacher, student: Any) -> None:
    """One step."""
    teacher.update(student)


MODEL, LOADER = nn.Identity(), [(torch.randn(2, 3), torch.tensor([0, 2]))]
INPUTS, LABELS = LOADER[0]
A = weights()
TEACHER, OF_A_TEACHER = EMATeacher(nn.Linear(3, 2)), "must be the model itself, got an EMATeacher; pass its .module"
SCHEDULES: list[tuple[str, Any, dict[str, Any]]] = [
    ("constant", schedules.constant, {"decay": 0.9}),
    ("linear_warmup", schedules.linear_warmup, {"start": 0.1, "end": 0.9, "updates": 10}),
    ("power", schedules.power, {}),
    ("uniform", schedules.uniform, {}),
    ("beta", schedules.beta, {"a": 0.5, "b": 0.5, "updates": 10}),
    ("every", schedules.every, {"steps": 2, "decay": 0.9}),
]
NEW = {name: Target(f"schedules.{name}", make, given.copy) for name, make, given in SCHEDULES}


def giving(value: object) -> Any:
    """A ``forward`` that returns ``value``."""
    return lambda model, batch: value


TABLE: Table = [
    (
        [Target("EMATeacher", EMATeacher, lambda: {"student": nn.Linear(3, 2)})],
        [
            Wrong({"student": "ViT-B-16"}, TypeError, "student must be of type Module, got str; pass the model itself"),
            Wrong({"decay": 1.5}, ValueError, "decay must be in [0, 1], got 1.5; did you mean 0.15?"),
            Wrong({"decay": math.nan}, ValueError, "decay must be finite, got nan"),
            Wrong({"decay": torch.tensor(0.9)}, TypeError, "decay must be a real number, got Tensor tensor(0.9000)"),
            Wrong({"update_every": 0}, ValueError, "update_every must be >= 1, got 0"),
            Wrong({"update_every": 1.0}, TypeError, "update_every must be an int, got float 1.0"),
            Wrong({"share_frozen": "no"}, TypeError, "share_frozen must be True or False, got str 'no'"),
            Wrong(
                {"student": nn.Linear(3, 2).requires_grad_(False), "device": "meta", "share_frozen": True},
                ValueError,
                "device must be the student's, whose tensors share_frozen=True uses, got meta; leave out device or "
                "share_frozen",
            ),
            Wrong({"copy": "model"}, TypeError, "copy must be of type Module, got str; pass the model itself"),
            Wrong({"copy": TEACHER}, TypeError, f"copy {OF_A_TEACHER}"),
            Wrong({"student": TEACHER}, TypeError, f"student {OF_A_TEACHER}"),
            Wrong(
                {"student": nn.Linear(2, 2, device="meta")},
                ValueError,
                "student's weight must have values, got a meta tensor; load or initialise the model first",
            ),
        ],
    ),
    (
        [Target("EMATeacher.update", update, followed), Target("EMATeacher.swapped_into", swap, followed)],
        [
            Wrong({"student": {}}, TypeError, "student must be of type Module, got dict; pass the model itself"),
            Wrong({"student": TEACHER}, TypeError, f"student {OF_A_TEACHER}"),
            Wrong(
                {"student": nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))},
                ValueError,
                "teacher and student must have the same names and shapes; missing from student: weight, bias; "
                "unexpected in student: 0.weight, 0.bias, 1.weight and 1 more; are they one architecture, with the "
                "same adapters?",
            ),
            Wrong(
                {"student": nn.Linear(4, 2)},
                ValueError,
                "teacher and student must have the same names and shapes; of another shape in student: weight [2, 4] "
                "for [2, 3]; are they one architecture, with the same adapters?",
            ),
            Wrong(
                {"student": nn.ModuleDict({"module": nn.ModuleDict({"a": nn.Linear(3, 2)}), "a": nn.Linear(3, 2)})},
                ValueError,
                "names in the ModuleDict must differ without the words of wrappers, such as 'module' and '_orig_mod', "
                "got 2 that do not; rename the submodule 'module'",
            ),
            Wrong(
                {
                    "teacher": EMATeacher(nn.Sequential(*[nn.Linear(1, 1)] * 2)),
                    "student": nn.Sequential(*map(nn.Linear, (1, 1), (1, 1))),
                },
                ValueError,
                "1.weight is tied to another parameter in the teacher but not in the student; tie the "
                "student's parameters before the teacher copies it, and keep them tied",
            ),
        ],
    ),
    (
        [Target("EMATeacher.update", update, followed)],
        [
            Wrong(
                {"teacher": EMATeacher(nn.Linear(3, 2), lambda n: -0.1)},
                ValueError,
                "decay must be in [0, 1], got -0.1",
            )
        ],
    ),
    ([NEW["constant"], NEW["every"]], [Wrong({"decay": -1.0}, ValueError, "decay must be in [0, 1], got -1.0")]),
    ([NEW["every"]], [Wrong({"steps": 0}, ValueError, "steps must be >= 1, got 0")]),
    (
        [NEW["linear_warmup"], NEW["power"]],
        [
            Wrong({"start": -0.05}, ValueError, "start must be in [0, 1], got -0.05"),
            Wrong({"end": 90}, ValueError, "end must be in [0, 1], got 90; did you mean 0.9?"),
        ],
    ),
    (
        [NEW["linear_warmup"], NEW["beta"]],
        [Wrong({"updates": 2.0}, TypeError, "updates must be an int, got float 2.0")],
    ),
    (
        [NEW["power"]],
        [
            Wrong({"exponent": 0.0}, ValueError, "exponent must be > 0, got 0.0"),
            Wrong({"scale": -1.0}, ValueError, "scale must be > 0, got -1.0"),
            Wrong({"start": 0.9, "end": 0.5}, ValueError, "start must be <= end, got 0.9 and 0.5; swap them"),
        ],
    ),
    (
        [NEW["beta"]],
        [
            Wrong(
                {"updates": 10**8},
                ValueError,
                "updates must be at most 10,000,000, got 100000000; was another number meant?",
            ),
            Wrong({"a": 0.0}, ValueError, "a must be > 0, got 0.0"),
            Wrong({"b": math.inf}, ValueError, "b must be finite, got inf"),
        ],
    ),
    (
        [Target(f"schedules.{name}.__call__", make(**given), lambda: {"n": 0}) for name, make, given in SCHEDULES],
        [
            Wrong({"n": -1}, ValueError, "n must be >= 0, got -1"),
            Wrong({"n": 1.0}, TypeError, "n must be an int, got float 1.0"),
        ],
    ),
    (
        [Target("interpolate", interpolate, lambda: {"zero_shot": weights(), "fine_tuned": weights(), "alpha": 0.5})],
        [
            Wrong(
                {"alpha": -0.5},
                ValueError,
                "alpha must be in [0, 1], got -0.5; pass extrapolate=True to leave the line",
            ),
            Wrong({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
            Wrong({"alpha": "0.5"}, TypeError, "alpha must be a real number, got str '0.5'"),
            Wrong({"alpha": math.inf, "extrapolate": True}, ValueError, "alpha must be finite, got inf"),
            Wrong({"extrapolate": 1}, TypeError, "extrapolate must be True or False, got int 1"),
            Wrong(
                {"alpha": lambda name: 1.5},
                ValueError,
                "alpha('w') must be in [0, 1], got 1.5; pass extrapolate=True to leave the line",
            ),
            Wrong({"alpha": lambda name: None}, TypeError, "alpha('w') must be a real number, got NoneType None"),
            Wrong({"zero_shot": "a.pt"}, TypeError, "zero_shot must be a state dict or a torch.nn.Module, got str"),
            Wrong({"zero_shot": TEACHER}, TypeError, f"zero_shot {OF_A_TEACHER}"),
            Wrong({"fine_tuned": TEACHER}, TypeError, f"fine_tuned {OF_A_TEACHER}"),
            *(
                Wrong(
                    {one: {"w": A["w"]}, other: EMATeacher(nn.ParameterDict({"w": A["w"]})).state_dict()},
                    ValueError,
                    "zero_shot and fine_tuned must have the same names and shapes; "
                    f"{wrong} fine_tuned: step, updates; is one the state of an EMATeacher? pass teacher.module",
                )
                for one, other, wrong in (
                    ("zero_shot", "fine_tuned", "unexpected in"),
                    ("fine_tuned", "zero_shot", "missing from"),
                )
            ),
            Wrong(
                {"fine_tuned": weights(updates=A["w"])},
                ValueError,
                "zero_shot and fine_tuned must have the same names and shapes; unexpected in fine_tuned: updates; are "
                "they one architecture, with the same adapters?",
            ),
            Wrong(
                {"fine_tuned": weights(extra=A["w"])},
                ValueError,
                "zero_shot and fine_tuned must have the same names and shapes; unexpected in fine_tuned: extra; are "
                "they one architecture, with the same adapters?",
            ),
            Wrong(
                {"fine_tuned": {"state_dict": A}},
                TypeError,
                "fine_tuned['state_dict'] must be a torch.Tensor, got dict; convert it with torch.as_tensor",
            ),
            Wrong(
                {"fine_tuned": weights(w=torch.ones(2, 3).to(torch.float8_e4m3fn))},
                TypeError,
                "fine_tuned['w'] must not be quantised, because integers cannot be averaged apart from their scales, "
                "got Tensor of torch.float8_e4m3fn; combine the models before, or dequantise them",
            ),
            Wrong(
                {"fine_tuned": weights(w=torch.ones(2, 3).to_sparse())},
                TypeError,
                "fine_tuned['w'] must be a dense tensor, got torch.sparse_coo; convert it with .to_dense(), or pad it",
            ),
            Wrong(
                {"zero_shot": {1: A["w"]}, "fine_tuned": {1: A["w"]}},
                TypeError,
                "zero_shot must map names to tensors, got the key 1; is it a state dict?",
            ),
            Wrong(
                {"zero_shot": {"w": torch.ones(2, dtype=torch.int8)}, "fine_tuned": {"w": torch.zeros(2).char()}},
                TypeError,
                "zero_shot['w'] must not be quantised, because integers cannot be averaged apart from their scales, "
                "got torch.int8 values that differ between the models; combine the models before, or "
                "dequantise them",
            ),
        ],
    ),
    (
        [Target("average", average, lambda: {"models": [weights(), weights()]})],
        [
            Wrong(
                {"models": [weights(m=torch.ones(2, device="meta"))] * 2},
                ValueError,
                "models[0]'s m must have values, got a meta tensor; load or initialise the model first",
            ),
            Wrong({"models": []}, ValueError, "models must be at least 1, got 0; is it a used generator?"),
            Wrong({"models": [A, 3]}, TypeError, "models[1] must be a state dict or a torch.nn.Module, got int"),
            Wrong(
                {"weights": 0.5},
                TypeError,
                "weights must be of type Iterable, got float; pass a list with a number for each model",
            ),
            Wrong({"weights": [1, None]}, TypeError, "weights[1] must be a real number, got NoneType None"),
            Wrong({"weights": [1, math.nan]}, ValueError, "weights[1] must be finite, got nan"),
            *(
                Wrong(
                    {"weights": given},
                    ValueError,
                    "weights must be 2 numbers >= 0, one for each model, not all 0, got "
                    f"{[float(share) for share in given]}",
                )
                for given in ([1], [1, 2, 3], [], [2, -1], [0, 0])
            ),
        ],
    ),
    (
        [
            Target("average", average, lambda: {"models": [weights(), weights()]}),
            Target("model_stock", model_stock, lambda: {"pretrained": weights(), "models": [weights(), weights()]}),
        ],
        [
            Wrong({"models": A}, TypeError, "models must be an iterable of models, got dict"),
            Wrong({"models": None}, TypeError, "models must be an iterable of models, got NoneType"),
            Wrong({"models": [A, Odd()]}, TypeError, "models[1] must be a state dict or a torch.nn.Module, got Odd"),
            Wrong({"models": [TEACHER] * 2}, TypeError, f"models[0] {OF_A_TEACHER}"),
        ],
    ),
    (
        [Target("model_stock", model_stock, lambda: {"pretrained": weights(), "models": [weights(), weights()]})],
        [
            Wrong({"models": [A]}, ValueError, "models must be at least 2, got 1; is it a used generator?"),
            Wrong({"pretrained": TEACHER}, TypeError, f"pretrained {OF_A_TEACHER}"),
        ],
    ),
    (
        [Target("zero_shot_classifier", zero_shot_classifier, named_texts)],
        [
            Wrong(
                {"model": torch.zeros},
                TypeError,
                "model must be of type Module, got builtin_function_or_method; pass the model itself",
            ),
            Wrong({"model": TEACHER}, TypeError, f"model {OF_A_TEACHER}"),
            Wrong(
                {"model": MODEL},
                TypeError,
                "model must have encode_text or get_text_features, got Identity; "
                "pass the CLIP of open_clip or of Transformers itself, without a wrapper",
            ),
            *(
                Wrong(
                    {"names": names},
                    TypeError,
                    f"names must be a list of texts, got {kind}; pass one name for each class",
                )
                for names, kind in (("a cat", "str"), ([1, 2], "list of 2"), (3, "int"))
            ),
            Wrong({"names": []}, ValueError, "names and templates must not be empty, got 0 names and 1 templates"),
            Wrong({"templates": []}, ValueError, "names and templates must not be empty, got 2 names and 0 templates"),
            *(
                Wrong({"templates": templates}, ValueError, "templates must hold {} where the name goes, got 'a cat'")
                for templates in ("a cat", ["{}", "a cat"])
            ),
            Wrong(
                {"templates": 3},
                TypeError,
                "templates must be texts or functions, got int; pass 'a photo of a {}.'",
            ),
            Wrong({"templates": lambda name: [name]}, TypeError, "templates must return texts, got list of 1"),
            Wrong(
                {"tokenizer": lambda texts: [[1, 2]] * len(texts)},
                TypeError,
                "the tokenizer's output must be of type Tensor, got list; pass the model's own tokenizer",
            ),
        ],
    ),
    (
        [Target("collect_logits", collect_logits, lambda: {"model": MODEL, "loader": LOADER, "progress": False})],
        [
            Wrong(
                {"model": torch.zeros},
                TypeError,
                "model must be of type Module, got builtin_function_or_method; pass the model itself",
            ),
            Wrong(
                {"loader": 5},
                TypeError,
                "loader must be iterable, got int; pass a DataLoader or a list of batches",
            ),
            Wrong(
                {"loader": []},
                ValueError,
                "loader must yield at least one batch, got none; a used generator, or drop_last?",
            ),
            Wrong(
                {"loader": [INPUTS]},
                TypeError,
                "loader must yield (inputs, target) or a dict with labels, got Tensor; pass "
                "forward=lambda model, batch: (logits, target)",
            ),
            Wrong(
                {"loader": [(INPUTS, LABELS, LABELS)]},
                TypeError,
                "loader must yield (inputs, target) or a dict with labels, got tuple of 3; pass "
                "forward=lambda model, batch: (logits, target)",
            ),
            Wrong(
                {"loader": [{"jpg": INPUTS, "cls": LABELS}]},
                TypeError,
                "loader must yield (inputs, target) or a dict with labels, got dict with jpg, cls; pass "
                "forward=lambda model, batch: (logits, target)",
            ),
            Wrong(
                {"loader": [(INPUTS, LABELS[:1])]},
                ValueError,
                "target must have shape [2], one label for each row, got [1]",
            ),
            Wrong(
                {"loader": [(INPUTS, LABELS.float())]},
                TypeError,
                "target must have dtype torch.int64, got torch.float32; convert it with .long()",
            ),
            Wrong(
                {"loader": [(INPUTS[0], LABELS)]},
                ValueError,
                "logits must have shape [N, C, ...], one row for each sample and one column for each class, got [3]; "
                "add the dimension that is missing with .unsqueeze()",
            ),
            Wrong(
                {"loader": [(INPUTS, LABELS), (INPUTS[:, :2], LABELS)]},
                ValueError,
                "logits must have the same number of classes in every batch, got 3 and then 2; is the "
                "loader one of a single data set?",
            ),
            Wrong(
                {"forward": "model"},
                TypeError,
                "forward must be callable, got str; pass forward=lambda model, batch: (logits, target)",
            ),
            Wrong({"forward": giving(INPUTS)}, TypeError, "forward must return (logits, target), got Tensor"),
            Wrong(
                {"forward": giving((INPUTS, LABELS, 1))},
                TypeError,
                "forward must return (logits, target), got tuple of 3",
            ),
            Wrong(
                {"forward": giving((None, LABELS))},
                TypeError,
                "logits must be a torch.Tensor, got NoneType; convert it with torch.as_tensor",
            ),
            Wrong(
                {"forward": giving((INPUTS, None))},
                TypeError,
                "target must be a torch.Tensor, got NoneType; convert it with torch.as_tensor",
            ),
        ],
    ),
]
