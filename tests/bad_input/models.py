"""Wrong calls of what holds, moves and combines weights, and of what runs a model."""

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


class Nested(nn.Module):
    """Two tensors whose names differ by a wrapper's word alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.module = nn.Linear(1, 1, bias=False)


def tied() -> nn.Module:
    """One layer under two names."""
    return nn.Sequential(*[nn.Linear(1, 1)] * 2)


def update(teacher: EMATeacher, student: Any) -> None:
    """One step."""
    teacher.update(student)


MODEL, LOADER = nn.Identity(), [(torch.randn(2, 3), torch.tensor([0, 2]))]
INPUTS, LABELS = LOADER[0]
A, B, C = weights(), weights(), weights()
SCHEDULES: list[tuple[str, Any, dict[str, Any]]] = [
    ("constant", schedules.constant, {"decay": 0.9}),
    ("linear_warmup", schedules.linear_warmup, {"start": 0.1, "end": 0.9, "updates": 10}),
    ("power", schedules.power, {}),
    ("uniform", schedules.uniform, {}),
    ("beta", schedules.beta, {"a": 0.5, "b": 0.5, "updates": 10}),
]
NEW = {name: Target(f"schedules.{name}", make, given.copy) for name, make, given in SCHEDULES}


def giving(value: object) -> Any:
    """A ``forward`` that returns ``value``."""
    return lambda model, batch: value


TABLE: Table = [
    (
        [Target("EMATeacher", EMATeacher, lambda: {"student": nn.Linear(3, 2)})],
        [
            Wrong({"student": "ViT-B-16"}, TypeError, "student must be a torch.nn.Module, got str"),
            Wrong(
                {"student": nn.Linear(3, 2).state_dict()},
                TypeError,
                "student must be a torch.nn.Module, got OrderedDict",
            ),
            Wrong({"decay": 1.5}, ValueError, "decay must be in [0, 1], got 1.5; did you mean 0.15 or 0.015?"),
            Wrong({"decay": -0.1}, ValueError, "decay must be in [0, 1], got -0.1"),
            Wrong({"decay": 99}, ValueError, "decay must be in [0, 1], got 99; did you mean 9.9 or 0.99?"),
            Wrong({"decay": math.nan}, ValueError, "decay must be finite, got nan"),
            Wrong({"decay": "0.9"}, TypeError, "decay must be a real number, got str '0.9'"),
            Wrong({"decay": None}, TypeError, "decay must be a real number, got NoneType None"),
            Wrong({"decay": torch.tensor(0.9)}, TypeError, "decay must be a real number, got Tensor tensor(0.9000)"),
            Wrong({"update_every": 0}, ValueError, "update_every must be > 0, got 0"),
            Wrong({"update_every": 1.0}, TypeError, "update_every must be an int, got float 1.0"),
        ],
    ),
    (
        [Target("EMATeacher.update", update, followed), Target("EMATeacher.swapped_into", swap, followed)],
        [
            Wrong({"student": {}}, TypeError, "student must be a torch.nn.Module, got dict"),
            Wrong({"student": None}, TypeError, "student must be a torch.nn.Module, got NoneType"),
            Wrong(
                {"student": nn.Linear(3, 2, bias=False)},
                ValueError,
                "teacher and student must have the same names and shapes; missing from student: bias; are"
                " they one architecture, and saved without a wrapper's prefix?",
            ),
            Wrong(
                {"student": nn.Sequential(nn.Linear(3, 2))},
                ValueError,
                "teacher and student must have the same names and shapes; missing from student: weight, "
                "bias; unexpected in student: 0.weight, 0.bias; are they one architecture, and saved "
                "without a wrapper's prefix?",
            ),
            Wrong(
                {"student": nn.Linear(4, 2)},
                ValueError,
                "teacher and student must have the same names and shapes; of another shape in student: "
                "weight [2, 4] for [2, 3]; are they one architecture, and saved without a wrapper's "
                "prefix?",
            ),
            Wrong(
                {"student": Nested()},
                ValueError,
                "two tensors of the Nested are named 'weight' once 'module' and '_orig_mod' are stripped "
                "from their paths; rename the submodule that is called 'module'",
            ),
            Wrong(
                {"teacher": EMATeacher(tied()), "student": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))},
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
                {"teacher": EMATeacher(nn.Linear(3, 2), lambda n: 1.5)},
                ValueError,
                "decay must be in [0, 1], got 1.5; did you mean 0.15 or 0.015?",
            ),
            Wrong(
                {"teacher": EMATeacher(nn.Linear(3, 2), lambda n: torch.tensor(0.5))},  # type: ignore[arg-type, return-value]
                TypeError,
                "decay must be a real number, got Tensor tensor(0.5000)",
            ),
        ],
    ),
    (
        [NEW["constant"]],
        [
            Wrong({"decay": 1.01}, ValueError, "decay must be in [0, 1], got 1.01; did you mean 0.101 or 0.0101?"),
            Wrong({"decay": math.nan}, ValueError, "decay must be finite, got nan"),
            Wrong({"decay": "0.9"}, TypeError, "decay must be a real number, got str '0.9'"),
        ],
    ),
    (
        [NEW["linear_warmup"]],
        [
            Wrong({"start": -0.05}, ValueError, "start must be in [0, 1], got -0.05"),
            Wrong({"end": 90}, ValueError, "end must be in [0, 1], got 90; did you mean 9 or 0.9?"),
            Wrong({"end": None}, TypeError, "end must be a real number, got NoneType None"),
        ],
    ),
    (
        [NEW["linear_warmup"], NEW["beta"]],
        [
            Wrong({"updates": 0}, ValueError, "updates must be > 0, got 0"),
            Wrong({"updates": 2.0}, TypeError, "updates must be an int, got float 2.0"),
            Wrong({"updates": True}, TypeError, "updates must be an int, got bool True"),
        ],
    ),
    (
        [NEW["power"]],
        [
            Wrong({"exponent": 0.0}, ValueError, "exponent must be > 0, got 0.0"),
            Wrong({"scale": -1.0}, ValueError, "scale must be > 0, got -1.0"),
            Wrong({"start": 0.9, "end": 0.5}, ValueError, "start <= end must hold, got 0.9, 0.5; swap them"),
            Wrong({"end": 1.5}, ValueError, "end must be in [0, 1], got 1.5; did you mean 0.15 or 0.015?"),
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
            Wrong({"b": -0.5}, ValueError, "b must be > 0, got -0.5"),
            Wrong({"b": math.inf}, ValueError, "b must be finite, got inf"),
        ],
    ),
    (
        [Target(f"schedules.{name}.__call__", make(**given), lambda: {"n": 0}) for name, make, given in SCHEDULES],
        [
            Wrong({"n": -1}, ValueError, "n must be >= 0, got -1"),
            Wrong({"n": 1.0}, TypeError, "n must be an int, got float 1.0"),
            Wrong({"n": 10**400}, ValueError, f"n must be finite, got {10**400}"),
            Wrong({"n": None}, TypeError, "n must be an int, got NoneType None"),
        ],
    ),
    (
        [Target("interpolate", interpolate, lambda: {"zero_shot": weights(), "fine_tuned": weights(), "alpha": 0.5})],
        [
            Wrong({"alpha": 1.5}, ValueError, "alpha must be in [0, 1], got 1.5; did you mean 0.15 or 0.015?"),
            Wrong({"alpha": -0.5}, ValueError, "alpha must be in [0, 1], got -0.5"),
            Wrong({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
            Wrong({"alpha": torch.tensor(0.5)}, TypeError, "alpha must be a real number, got Tensor tensor(0.5000)"),
            Wrong({"zero_shot": "a.pt"}, TypeError, "zero_shot must be a state dict or a torch.nn.Module, got str"),
            Wrong({"fine_tuned": [A]}, TypeError, "fine_tuned must be a state dict or a torch.nn.Module, got list"),
            Wrong(
                {"fine_tuned": {"w": A["w"]}},
                ValueError,
                "zero_shot and fine_tuned must have the same names and shapes; missing from fine_tuned: "
                "n; are they one architecture, and saved without a wrapper's prefix?",
            ),
            Wrong(
                {"fine_tuned": weights(extra=A["w"])},
                ValueError,
                "zero_shot and fine_tuned must have the same names and shapes; unexpected in fine_tuned: "
                "extra; are they one architecture, and saved without a wrapper's prefix?",
            ),
            Wrong(
                {"fine_tuned": weights(w=torch.ones(3, 2))},
                ValueError,
                "zero_shot and fine_tuned must have the same names and shapes; of another shape in "
                "fine_tuned: w [3, 2] for [2, 3]; are they one architecture, and saved without a "
                "wrapper's prefix?",
            ),
            Wrong(
                {"fine_tuned": {"module." + name: value for name, value in A.items()}},
                ValueError,
                "zero_shot and fine_tuned must have the same names and shapes; missing from fine_tuned: "
                "w, n; unexpected in fine_tuned: module.w, module.n; are they one architecture, and saved"
                " without a wrapper's prefix?",
            ),
            Wrong(
                {"fine_tuned": {"state_dict": A}},
                TypeError,
                "fine_tuned['state_dict'] must be a torch.Tensor, got dict; convert it with torch.as_tensor",
            ),
            Wrong(
                {"fine_tuned": weights(w=torch.ones(2, 3).to(torch.float8_e4m3fn))},
                TypeError,
                "fine_tuned['w'] must be floating point of at least 16 bits, got torch.float8_e4m3fn; "
                "convert it with .float()",
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
        ],
    ),
    (
        [Target("average", average, lambda: {"models": [weights(), weights()]})],
        [
            Wrong({"models": []}, ValueError, "models must hold at least one model, got none"),
            Wrong({"models": A}, TypeError, "models must be a sequence such as a list, got dict"),
            Wrong({"models": nn.Linear(1, 1)}, TypeError, "models must be a sequence such as a list, got Linear"),
            Wrong({"models": None}, TypeError, "models must be a sequence such as a list, got NoneType"),
            Wrong({"models": "ab"}, TypeError, "models[0] must be a state dict or a torch.nn.Module, got str"),
            Wrong({"models": [A, 3]}, TypeError, "models[1] must be a state dict or a torch.nn.Module, got int"),
            Wrong(
                {"models": [A, B, {"w": A["w"]}]},
                ValueError,
                "models[0] and models[2] must have the same names and shapes; missing from models[2]: n; "
                "are they one architecture, and saved without a wrapper's prefix?",
            ),
            Wrong(
                {"models": [{"w": 1.0}]},
                TypeError,
                "models[0]['w'] must be a torch.Tensor, got float; convert it with torch.as_tensor",
            ),
        ],
    ),
    (
        [Target("model_stock", model_stock, lambda: {"pretrained": weights(), "models": [weights(), weights()]})],
        [
            Wrong({"models": [A]}, ValueError, "models must hold at least two models, whose angle matters, got 1"),
            Wrong({"models": A}, TypeError, "models must be a sequence such as a list, got dict"),
            Wrong(
                {"pretrained": None}, TypeError, "pretrained must be a state dict or a torch.nn.Module, got NoneType"
            ),
            Wrong(
                {"pretrained": weights(w=torch.ones(4))},
                ValueError,
                "pretrained and models[0] must have the same names and shapes; of another shape in "
                "models[0]: w [2, 3] for [4]; are they one architecture, and saved without a wrapper's "
                "prefix?",
            ),
            Wrong({"models": [A, Odd()]}, TypeError, "models[1] must be a state dict or a torch.nn.Module, got Odd"),
        ],
    ),
    (
        [Target("zero_shot_classifier", zero_shot_classifier, named_texts)],
        [
            Wrong({"model": torch.zeros}, TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
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
        ],
    ),
    (
        [Target("collect_logits", collect_logits, lambda: {"model": MODEL, "loader": LOADER, "progress": False})],
        [
            Wrong({"model": torch.zeros}, TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
            Wrong(
                {"loader": 5},
                TypeError,
                "loader must be something to iterate over, got int; pass a DataLoader or a list of batches",
            ),
            Wrong(
                {"loader": []},
                ValueError,
                "loader must yield at least one batch, got none; an exhausted generator, or drop_last?",
            ),
            Wrong(
                {"loader": [INPUTS]},
                TypeError,
                "loader must yield (inputs, target), got Tensor; pass forward=lambda model, batch: (logits, target)",
            ),
            Wrong(
                {"loader": [(INPUTS, LABELS, LABELS)]},
                TypeError,
                "loader must yield (inputs, target), got tuple of 3; pass forward=lambda model, batch: "
                "(logits, target)",
            ),
            Wrong(
                {"loader": [{"inputs": INPUTS}]},
                TypeError,
                "loader must yield (inputs, target), got dict; pass forward=lambda model, batch: (logits, target)",
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
