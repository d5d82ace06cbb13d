"""The Triton kernels against the dense definition, on a CUDA device or, interpreted by Triton, on the CPU.

Triton decides when it is imported whether it interprets. So the tests of the kernels need a GPU here, and
`test_the_kernels_are_right_under_the_interpreter` runs this file once more in a process of its own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wrong_kernels
from ahead_of_time import compiled
from matrices import assert_like_dense, factors, pairs, value_and_gradients, vectors
from strategies import class_labels, unit_rows
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from calrobust import CaRotLoss
from calrobust.functional import carot_loss, multimodal_contrastive_loss, multimodal_distillation_loss
from calrobust.kernels import dense, operators
from calrobust.kernels.dense import Factors, Pairing, merge
from calrobust.kernels.sigmoid import Classes, Model, sigmoid_sums
from calrobust.kernels.tiled import Softmaxes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

Test = Callable[..., None]


def kernels(test: Test) -> Test:
    """A test that runs the kernels."""
    return test if INTERPRETED else pytest.mark.gpu(test)


statistics = partial(operators.softmax_statistics, impl="triton")


@pytest.fixture(autouse=True)
def _on_the_device() -> Any:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16, one block of rows a tile, several programs for its columns: every seam in small matrices."""
    blocks = importlib.import_module("calrobust.kernels.triton")
    softmax = importlib.import_module("calrobust.kernels.triton.softmax")
    for size in blocks.BLOCKS:
        monkeypatch.setitem(blocks.BLOCKS, size, blocks.Blocks(16, 16, 16, 4, 2))
    monkeypatch.setattr(blocks, "TILE_BYTES", 0)
    monkeypatch.setattr(softmax, "SUMS_BYTES", 0)
    monkeypatch.setattr(softmax, "SPANS", 1)
    monkeypatch.setattr(softmax, "COLUMN_SPAN", 2)
    monkeypatch.setattr(softmax, "_programs", lambda device: 2)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs this file")
def test_the_kernels_are_right_under_the_interpreter() -> None:
    """All tests below that run kernels, on the CPU."""
    ignored = "ignore:Conversion of an array with ndim:DeprecationWarning"  # what Triton 3.4 does to NumPy
    options = ["-q", "-n0", "-W", ignored, "-m", "not gpu", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(INTERPRETED, reason="starts interpreted processes of its own")
def test_ranks_run_the_kernels_on_their_strips(tmp_path: Path) -> None:
    """Two gloo processes with 13 and 20 pairs of low precision: each rank's own pairs are where they are exact."""
    run_on_ranks(tmp_path, "gloo", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_run_the_kernels_on_a_device_each(tmp_path: Path) -> None:
    """The same over NCCL."""
    run_on_ranks(tmp_path, "nccl", {})


def run_on_ranks(folder: Path, backend: str, environment: dict[str, str]) -> None:
    """Both ranks of `kernels_on_a_rank.py`."""
    script = Path(__file__).parents[1] / "kernels_on_a_rank.py"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(folder), backend],
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


SHAPES = [(1, 1, 1), (1, 37, 5), (37, 1, 3), (16, 16, 16), (50, 33, 17), (33, 50, 20), (70, 70, 1)]


@kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize(("n", "m", "width"), SHAPES)
def test_equals_the_dense_definition(n: int, m: int, width: int, teacher: bool) -> None:
    """Value and gradients of every statistic in float64, for whole and uneven blocks, flat and peaked."""
    for scale in (0.01, 30.0):
        assert_like_dense(statistics, moved(factors(n, m, width, 0, scale=scale, teacher=teacher)), 1e-12)


def moved(inputs: list[Factors], dtype: torch.dtype = torch.float64) -> list[Factors]:
    """To the device and a dtype."""
    return [Factors(x.to(DEVICE, dtype), y.to(DEVICE, dtype), s.to(DEVICE, dtype)) for x, y, s in inputs]


@kernels
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [False, True])
def test_keeps_its_precision_at_its_own_blocks(operands: torch.dtype, teacher: bool) -> None:
    """float32 within 5e-6; the gradient of low-precision features within 1e-3, in the Frobenius norm, of float64's."""
    inputs = moved(factors(150, 140, 70, 0, scale=20.0, teacher=teacher))
    inputs = moved(moved(inputs, operands), torch.float32)
    expected, expected_gradients = value_and_gradients(dense.softmax_statistics, moved(inputs))
    ours = partial(statistics, operands=operands)
    outputs, gradients = value_and_gradients(ours, inputs)
    for a, b in zip(outputs, expected, strict=True):
        assert_close(a.double(), b, rtol=5e-6, atol=5e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a.double() - b).norm() <= (5e-6 if operands == torch.float32 else 1e-3) * b.norm()


@kernels
@pytest.mark.parametrize("options", [{"impl": "triton"}, {"impl": "tiled"}, {"impl": "auto"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "margin"), [(10.0, 1.0), (15.0, 0.5)])  # p of the own pair is 0.75 and 0.995
def test_a_trained_model_gets_gradients_as_exact_as_its_dtype(
    dtype: torch.dtype, scale: float, margin: float, options: dict[str, Any]
) -> None:
    """Where p of the own pair is near 1, two parts of its gradient cancel; within 2e-3 of float64's all the same."""
    images, noise, common = (unit_rows(n, 64, seed).to(DEVICE) for n, seed in ((60, 0), (60, 1), (1, 2)))
    rows = images, images + margin * noise
    features = [F.normalize(0.5 * common + each).to(dtype) for each in rows]
    exact = [each.double().requires_grad_() for each in features]
    ours = [each.clone().requires_grad_() for each in features]
    multimodal_contrastive_loss(exact[0], exact[1], scale, impl="dense").backward()
    multimodal_contrastive_loss(ours[0], ours[1], scale, **options).backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad.double() - b.grad).norm() <= 2e-3 * b.grad.norm()


@kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("width", [5, 24])
def test_losses_are_those_of_the_dense_form(labelled: bool, width: int) -> None:
    """With labels, smoothing, temperature and a teacher of another width: value of each pair and every gradient."""
    labels = class_labels(21, 2).to(DEVICE) if labelled else None
    student = unit_rows(21, width, 0).to(DEVICE), unit_rows(21, width, 1).to(DEVICE), torch.tensor(14.0).double()
    teacher: Any = unit_rows(21, 7, 2).to(DEVICE), unit_rows(21, 7, 3).to(DEVICE), 9.0
    weights = torch.linspace(-1, 2, 21, dtype=torch.float64)
    found = []
    for impl in ("dense", "triton"):
        options: Any = {"reduction": "none", "impl": impl}
        inputs: Any = [value.clone().requires_grad_() for value in student]
        values = multimodal_contrastive_loss(*inputs, labels=labels, label_smoothing=0.2, **options)
        values = values + multimodal_distillation_loss(*inputs, *teacher, temperature=2.0, **options)
        values = values + carot_loss(
            *inputs, *teacher, labels=labels, label_smoothing=0.1, distillation_weight=1.5, **options
        )
        found.append([values, *torch.autograd.grad(values @ weights, inputs)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-11)


@kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float64])
def test_strips_of_rows_make_up_the_whole_matrix(operands: torch.dtype) -> None:
    """As of ranks: the rows of each strip, its gradient in the columns summed, its partners where they are."""
    whole = moved(factors(45, 45, 12, 0, scale=20.0, teacher=True))
    if operands == torch.bfloat16:
        whole = moved(moved(whole, operands), torch.float32)
    (x, y, scale), (tx, ty, t_scale) = whole
    texts = y.double().requires_grad_()
    pairing = pairs(45, 45)
    exact = Factors(x.double(), texts, scale.double()), Factors(tx.double(), ty.double(), t_scale.double())
    expected = dense.softmax_statistics(*exact, pairing)
    (expected_gradient,) = torch.autograd.grad(expected.rows.lse.sum() - expected.rows.lse[7], texts)
    y = y.requires_grad_()
    strips = [slice(0, 19), slice(19, 45)]
    found = [
        statistics(Factors(x[s], y, scale), Factors(tx[s], ty, t_scale), Pairing(pairing.partner[s]), operands=operands)
        for s in strips
    ]
    tolerance = 1e-12 if operands == torch.float64 else 5e-6
    rows = [torch.cat(parts) for parts in zip(*(strip.rows for strip in found), strict=True)]
    columns = merge([strip.columns for strip in found])
    for ours, theirs in zip([*rows, *columns], [*expected.rows, *expected.columns], strict=True):
        assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(rows[0].sum() - rows[0][7], y)
    tolerance = 1e-12 if operands == torch.float64 else 1e-3
    assert (gradient.double() - expected_gradient).norm() <= tolerance * expected_gradient.norm()


@kernels
@pytest.mark.parametrize("scales", [(100.0, 14.3), (100.0, 1.0)])
@pytest.mark.parametrize(("n", "m"), [(3, 14), (16, 27)])  # some columns have no own entry
def test_a_teacher_unlike_the_student_costs_no_digits(n: int, m: int, scales: tuple[float, float]) -> None:
    """Where the teacher's softmax is flat, sums of the student's are not differences of large numbers."""
    scale, t_scale = scales
    for seed in range(6):
        pictures = [unit_rows(m, 64, 4 * seed + k, torch.float32) for k in range(4)]
        texts = [F.normalize(a + 1.5 * b, dim=1).to(DEVICE) for a, b in zip(pictures[:2], pictures[2:], strict=True)]
        images = [rows[:n].to(DEVICE) for rows in pictures[:2]]
        found = []
        forms: Any = (torch.float64, "dense"), (torch.float32, "triton")
        for dtype, impl in forms:
            x, tx, y, ty = (rows.to(dtype) for rows in (*images, *texts))
            loss = multimodal_distillation_loss(x.requires_grad_(), y, scale, tx, ty, t_scale, impl=impl)
            found.append((loss.double(), torch.autograd.grad(loss, x)[0].double()))
        (expected, expected_gradient), (value, gradient) = found
        assert_close(value, expected, rtol=1e-5, atol=0)
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("teacher", [False, True])
def test_terms_that_underflow_are_not_lost(teacher: bool) -> None:
    """A row may rise far above the first block of columns. A small share of it may still be most of its column."""
    logits = torch.full((2, 2, 40), -60.0)
    logits[:, :, :16] = -10
    logits[:, 0, 16:18] = torch.tensor([70.0, -35.0])
    logits[1, 0, 17] = -34
    models = [Factors(rows, torch.eye(40), torch.tensor(1.0)) for rows in logits[: 1 + teacher]]
    apart = Pairing(torch.full([2], -1))
    found = statistics(models[0], models[1] if teacher else None, apart)
    models = moved(models)
    expected = dense.softmax_statistics(models[0], models[1] if teacher else None, apart)
    for ours, theirs in zip((*found.rows, *found.columns), (*expected.rows, *expected.columns), strict=True):
        assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@kernels
def test_a_flat_teacher_of_many_texts_costs_no_digits() -> None:
    """The student's lse of a row is not that of a difference of sums; the logits are exact."""
    n, m = 4, 2**14
    image, text, taught = torch.ones(n, 1), torch.full((m, 1), -20.0), -(torch.arange(m) % 7)[:, None] / 8
    text[10] = 0
    student, teacher = (Factors(image, each, torch.tensor(1.0)) for each in (text, taught))
    rows, *_ = statistics(student, teacher, pairs(n, m), columns=False)
    student, teacher = moved([student, teacher])
    expected, *_ = dense.softmax_statistics(student, teacher, pairs(n, m), columns=False)
    for ours, theirs in zip(rows, expected, strict=True):
        assert_close(ours.double(), theirs, rtol=3e-6, atol=5e-7)


@kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [100.0, 740.0, 1e4])
@pytest.mark.parametrize("teacher", [False, True])
def test_is_finite_and_exact_however_far_logits_lie_apart(teacher: bool, dtype: torch.dtype, gap: float) -> None:
    """A column far below the others of its tile, a row far above a column (trap 1)."""
    corners = torch.tensor([[gap, 0.0], [0.0, 1.0], [-gap, 2.0], [0.5, -1.0], [gap / 2, gap]], dtype=dtype)
    x, y = (
        corners.repeat(5, 1),
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [-0.5, 0.1]], dtype=dtype).repeat(6, 1),
    )
    one = torch.tensor(1.0, dtype=dtype)
    inputs = [Factors(x, y, one), Factors(x.flip(0), y.flip(0), 0.5 * one)][: 1 + teacher]
    outputs, gradients = value_and_gradients(statistics, inputs)
    assert all(v.isfinite().all() for v in (*outputs, *gradients))
    rounding = gap * torch.finfo(dtype).eps  # of a logsumexp of that size, and so of its exponential
    assert_like_dense(statistics, inputs, rounding + (1e-12 if dtype == torch.float64 else 1e-5))


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_nan_feature_gives_a_nan_loss_and_nan_gradients(dtype: torch.dtype) -> None:
    """Never a finite wrong value."""
    x, y = unit_rows(20, 6, 0, dtype).to(DEVICE), unit_rows(20, 6, 1, dtype).to(DEVICE)
    x[3, 2] = torch.nan
    image, text = x.requires_grad_(), y.requires_grad_()
    values = multimodal_contrastive_loss(image, text, 10.0, reduction="none", impl="triton")
    assert values.isnan().all()  # each text has the image among its candidates
    for gradient in torch.autograd.grad(values.sum(), (image, text)):
        assert gradient.isnan().any(1).all()


@kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
def test_a_teacher_equal_to_the_student_gives_exactly_zero(operands: torch.dtype) -> None:
    """Value and gradient: both sides take the same steps (trap 2)."""
    ((x, y, scale),) = moved(moved(factors(33, 40, 20, 0, scale=50.0, teacher=False), operands), torch.float32)
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    rows, columns, *_ = statistics(Factors(a, b, scale), Factors(x, y, scale), pairs(33, 40), operands=operands)
    assert (rows.divergence == 0).all()
    assert (columns.divergence == 0).all()
    for gradient in torch.autograd.grad(rows.divergence.sum() + columns.divergence.sum(), (a, b)):
        assert (gradient == 0).all()


@kernels
@pytest.mark.parametrize(
    ("size", "factor"), [(1e-36, 1.0), (1e-6, 1.0), (1e6, 1.0), (1e30, 1.0), (1e-6, 2.0**-20), (1e6, 2.0**-20)]
)
def test_low_precision_holds_gradients_of_any_size(size: float, factor: float) -> None:
    """A loss times a small or a large number, features far from unit norm: neither underflow nor overflow."""
    ((x, y, scale),) = moved(moved(factors(40, 40, 20, 0, scale=20.0, teacher=False), torch.bfloat16), torch.float32)
    expected = gradients_of_row_lse(x, y, scale, torch.float32)
    found = gradients_of_row_lse(factor * x, y, scale / factor, torch.bfloat16, size)
    for a, b, unit in zip(found, expected, (size / factor, size), strict=True):
        assert (a.double() / unit - b).norm() <= 1e-3 * b.norm()


def gradients_of_row_lse(x: Tensor, y: Tensor, scale: Tensor, operands: torch.dtype, weight: float = 1.0) -> Any:
    """Of their weighted sum, in x and y."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    strip = statistics(Factors(x, y, scale), None, pairs(len(x), len(y)), operands=operands)
    return torch.autograd.grad(weight * strip.rows.lse.sum(), (x, y))


@kernels
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_does_not_lower_the_precision(inside: bool) -> None:
    """Around forward, or around backward too."""
    image, text = (unit_rows(40, 16, seed, torch.float32).to(DEVICE).requires_grad_() for seed in (0, 1))
    expected = torch.autograd.grad(multimodal_contrastive_loss(image, text, 20.0, impl="triton"), (image, text))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = multimodal_contrastive_loss(image, text, 20.0, impl="triton")
        with torch.autocast(DEVICE, torch.bfloat16, enabled=inside):
            found = torch.autograd.grad(loss, (image, text))
    assert_close(found, expected, rtol=1e-6, atol=1e-9)


@kernels
def test_layout_of_the_features_does_not_matter() -> None:
    """Transposed and strided features give the statistics of their contiguous copies."""
    x, y = unit_rows(8, 12, 0).to(DEVICE)[:, ::2], unit_rows(6, 8, 1).to(DEVICE).T
    scale = torch.tensor(3.0).double()
    found, expected = (
        statistics(Factors(*features, scale), None, pairs(8, 8)) for features in ((x, y), (x.clone(), y.contiguous()))
    )
    assert_close(vectors(found), vectors(expected))


# opcheck itself looks at the .grad of tensors that are no leaves
@kernels
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operator_passes_opcheck() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch.library checks them."""
    for teacher in (False, True):
        each = [factor for model in moved(factors(7, 5, 3, 0, scale=3.0, teacher=teacher)) for factor in model]
        inputs = [*each, pairs(7, 5).partner], "triton", torch.float64, True, True, -1
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.calrobust.softmax_statistics.default, inputs, test_utils=checks)


@kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own use of itself
def test_compiles_into_one_graph() -> None:
    """torch.compile(fullgraph=True) of a loss, with the value and the gradient of the eager one."""
    criterion = CaRotLoss(label_smoothing=0.1, distillation_weight=1.5, impl="triton")
    student = [unit_rows(9, 4, seed, torch.float32).to(DEVICE).requires_grad_() for seed in (0, 1)]
    teacher = [unit_rows(9, 4, seed, torch.float32).to(DEVICE) for seed in (2, 3)]
    compiled: Any = torch.compile(criterion, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    arguments = *student, 20.0, *teacher, 20.0
    for a, b in zip(
        torch.autograd.grad(compiled(*arguments), student),
        torch.autograd.grad(criterion(*arguments), student),
        strict=True,
    ):
        assert_close(a, b)


def sigmoid_inputs(n: int, m: int, width: int, dtype: torch.dtype, *, scale: float, teacher: bool) -> list[Model]:
    """A student that learns, and maybe a teacher, with numbers that ``dtype`` holds."""
    numbers = [torch.tensor(number).double() for number in (scale, -10.0, 0.9 * scale, -9.5)]
    features = [unit_rows(k, width, seed).to(DEVICE, dtype).double() for seed, k in enumerate((n, m, n, m))]
    student, other = Model(*features[:2], *numbers[:2]), Model(*features[2:], *numbers[2:])
    return [Model(*(factor.requires_grad_() for factor in student)), *([other] if teacher else [])]


def sigmoid_results(models: list[Model], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The sums and the gradients of their total, for features that are cast to a dtype."""
    n, m = len(models[0].x), len(models[0].y)
    classes = Classes(torch.arange(n) % 7, torch.arange(m) % 5)
    models = [Model(*(factor.detach().to(dtype).requires_grad_(factor.requires_grad) for factor in f)) for f in models]
    sums, total = sigmoid_sums(models, classes, [1.3, -0.4], **options)
    return [*sums[: len(models)], *torch.autograd.grad(total, models[0])]


@kernels
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize(("n", "m", "width"), SHAPES)
def test_sigmoid_sums_are_those_of_the_dense_definition(n: int, m: int, width: int, teacher: bool) -> None:
    """Values and gradients in float64, flat and peaked, whether forward or backward makes the gradients."""
    for scale in (0.01, 30.0, 3e3):
        models = sigmoid_inputs(n, m, width, torch.float64, scale=scale, teacher=teacher)
        expected = sigmoid_results(models, torch.float64, impl="dense")
        for totalled in (False, True):
            ours = sigmoid_results(models, torch.float64, impl="triton", totalled=totalled)
            for a, b in zip(ours, expected, strict=True):
                assert (a - b).norm() <= 1e-12 * b.norm()


@kernels
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [False, True])
def test_sigmoid_sums_keep_their_precision_at_their_own_blocks(operands: torch.dtype, teacher: bool) -> None:
    """Sums within 5e-6 of float64's; gradients, if features are of low precision, within 1e-3 of what they sum up."""
    models = sigmoid_inputs(150, 140, 70, operands, scale=20.0, teacher=teacher)
    expected = sigmoid_results(models, torch.float64, impl="dense")
    ours = sigmoid_results(models, torch.float32, impl="triton", operands=operands)
    for k, (a, b) in enumerate(zip(ours, expected, strict=True)):
        exact = operands == torch.float32 or k < len(models)
        size = b.norm() if b.ndim else expected[-1].abs()  # of the bias: nearly the sum of all absolute values
        assert (a.double() - b).norm() <= (5e-6 if exact else 1e-3) * size


@kernels
@pytest.mark.parametrize("bias", [-12.0, -20.0])
def test_sigmoid_sums_near_zero_keep_their_digits(bias: float) -> None:
    """Of a student that is sure of all its pairs, against a teacher that is less so and one that is equal to it."""
    features = [unit_rows(33, 16, seed).to(DEVICE).float() for seed in (0, 1)]
    scale = torch.tensor(2.0)
    student = Model(features[0], features[1], scale, torch.tensor(bias))
    teacher = student._replace(bias=student.bias + 1)
    nothing = Classes(torch.zeros(33, dtype=torch.int64), torch.ones(33, dtype=torch.int64))
    ours, _ = sigmoid_sums([student, teacher], nothing, [1.0, 1.0], impl="triton")
    exact = [Model(*(factor.double() for factor in model)) for model in (student, teacher)]
    for a, b in zip(ours, sigmoid_sums(exact, nothing, [1.0, 1.0], impl="dense")[0], strict=True):
        assert_close(a, b, rtol=2e-5, atol=0)
    same, _ = sigmoid_sums([student, student], nothing, [1.0, 1.0], impl="triton")
    assert (same.divergence == 0).all()


@kernels
def test_differentiating_the_kernels_twice_is_refused() -> None:
    """They have no second derivative, and say so instead of giving a wrong one."""
    x, y = unit_rows(5, 3, 0).to(DEVICE).requires_grad_(), unit_rows(5, 3, 1).to(DEVICE)
    loss = multimodal_contrastive_loss(x, y, 3.0, impl="triton")
    (gradient,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='pass impl="dense"'):
        torch.autograd.grad(gradient.sum(), x)


@kernels
@pytest.mark.parametrize("frozen", ["x", "y"])
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
def test_a_frozen_tower_leaves_the_other_gradients_as_they_are(frozen: str, operands: torch.dtype) -> None:
    """And has none itself."""
    features = [unit_rows(40, 8, seed, operands).to(DEVICE) for seed in (0, 1)]
    found: Any = []
    for needed in ((True, True), (frozen != "x", frozen != "y")):
        inputs: Any = [f.clone().requires_grad_(need) for f, need in zip(features, needed, strict=True)]
        scale = torch.tensor(20.0, requires_grad=True)
        multimodal_contrastive_loss(inputs[0], inputs[1], scale, impl="triton").backward()
        found.append([*(f.grad for f in inputs), scale.grad])
    for whole, part in zip(*found, strict=True):
        assert whole is not None
        assert part is None or (part - whole).norm() <= 1e-3 * whole.norm()
    assert [part is None for part in found[1]] == [frozen == "x", frozen == "y", False]


@kernels
@pytest.mark.parametrize("noise", [1.3, 2.0])
def test_float32_losses_keep_their_digits_near_zero(noise: float) -> None:
    """Within 2e-5 of float64 on the same features, and never negative (trap 43)."""
    images, noises = unit_rows(150, 64, 0), unit_rows(150, 64, 1)
    exact = [f.float().double().to(DEVICE) for f in (images, F.normalize(images + noise * noises))]
    moved = [F.normalize(f + 0.1 * unit_rows(150, 64, 7 + k).to(DEVICE)).float().double() for k, f in enumerate(exact)]
    for inputs in (exact, [*exact, *moved]):
        values = []
        forms: Any = (("triton", torch.float32), ("dense", torch.float64))
        for impl, dtype in forms:
            pairs: Any = [f.to(dtype) for f in inputs]
            student, teacher = (*pairs[:2], 40.0), (*pairs[2:], 40.0)
            if len(inputs) == 2:
                values.append(multimodal_contrastive_loss(*student, impl=impl, reduction="none"))
            else:
                values.append(multimodal_distillation_loss(*student, *teacher, impl=impl, reduction="none"))
        assert (values[0] >= 0).all()
        assert (values[0].double().mean() / values[1].mean() - 1).abs() <= 2e-5


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of the kernels."""
    monkeypatch.setattr(operators, "FAULTS", {})
    operators._warn_once.cache_clear()


def test_a_graph_that_is_captured_takes_the_form_of_the_steps_before(
    unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compared while it is captured, and what is known is not forgotten."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(operators, "fault", None)
    monkeypatch.setattr(operators, "may_take_triton", lambda impl, x: True)
    x = features_on("cuda:0", torch.float32)
    assert operators.kernels("softmax", "auto", x, x.dtype, teacher=False)
    operators.FAULTS[x.device, x.dtype, "softmax", False] = "broken"
    with pytest.warns(UserWarning, match="broken"):
        assert not operators.kernels("softmax", "auto", x, x.dtype, teacher=False)


def test_a_second_thread_waits_for_the_comparison(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would else take kernels that nobody has compared."""
    comparing, x = threading.Event(), features_on("cpu", torch.float32)

    def slowly_broken(*key: Any) -> str:
        operators.FAULTS[key] = ""  # as the comparison does, so that it takes the kernels itself
        comparing.set()
        time.sleep(0.3)
        return "broken"

    monkeypatch.setattr(operators, "fault", slowly_broken)
    monkeypatch.setattr(operators, "may_take_triton", lambda impl, x: True)

    def taken() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return operators.kernels("softmax", "auto", x, x.dtype, teacher=False)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(taken)
        assert comparing.wait(60)
        assert taken() is None
        assert first.result() is None


@kernels
@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_right_kernels_prove_themselves(form: str, operands: torch.dtype, teacher: bool) -> None:
    """Nothing is found, and nobody is warned."""
    assert operators.fault(torch.zeros(1).device, operands, form, teacher) == ""
    assert operators.kernels(form, "triton", torch.zeros(1), operands, teacher=teacher)


@kernels
@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("broken", ["_weighted_softmaxes", "_times"])
def test_wrong_kernels_are_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning, once, where any form will do; and where Triton is asked for, as an error with the reason."""
    softmax: Any = importlib.import_module("calrobust.kernels.triton.softmax")
    monkeypatch.setattr(softmax, broken, getattr(wrong_kernels, broken))
    monkeypatch.setattr(operators, "may_take_triton", lambda impl, x: True)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not operators.kernels("softmax", "auto", torch.zeros(1), torch.float32, teacher=True)
        said = [str(warning.message) for warning in caught]
        assert not said or "they differ from the tiled form by" in said[0]
    assert said == []
    features = [unit_rows(5, 3, seed, torch.float32).to(DEVICE) for seed in range(4)]
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot be used for .* they differ from the tiled form"):
        multimodal_distillation_loss(features[0], features[1], 3.0, features[2], features[3], 3.0, impl="triton")


@pytest.mark.usefixtures("unproven")
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there the kernels run")
def test_kernels_that_cannot_be_launched_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a Triton that finds no compiler or no driver: the reason is what it says itself, at the caller's line."""
    monkeypatch.setattr(operators, "may_take_triton", lambda impl, x: True)
    expected = r"not used for .* on cpu, .* RuntimeError: .*\(multimodal_contrastive_loss\)"
    with torch.device("cpu"), pytest.warns(UserWarning, match=expected) as caught:
        multimodal_contrastive_loss(torch.eye(2), torch.eye(2), 1.0, memory_budget=0)
    assert [warning.filename for warning in caught] == [__file__]


def test_the_cpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is in the way and what to do instead."""
    if not INTERPRETED:
        with torch.device("cpu"), pytest.raises(ValueError, match=r"got features on cpu; impl='auto' takes what"):
            multimodal_contrastive_loss(torch.eye(2), torch.eye(2), 1.0, impl="triton")
    monkeypatch.setattr(operators, "_TRITON_IS_INSTALLED", False)
    with torch.device("cpu"), pytest.raises(ValueError, match=r"impl='triton' needs triton .* got no triton to import"):
        multimodal_contrastive_loss(torch.eye(2), torch.eye(2), 1.0, impl="triton")


def features_on(device: str, dtype: torch.dtype) -> Any:
    """Features on a device that need not be there."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize(
    ("installed", "capability", "obstacle"),
    [(True, (9, 0), ""), (True, (8, 0), ""), (True, (7, 5), "compute capability 7.5"), (False, (9, 0), "no triton")],
)
def test_auto_takes_triton_on_cuda_wherever_it_runs(
    installed: bool, capability: tuple[int, int], obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fits into memory; the tiled form without triton, on older cards, on the CPU, in float64."""
    monkeypatch.setattr(operators, "_TRITON_IS_INSTALLED", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert obstacle in operators.obstacle_to_triton(torch.device("cuda", 0))
    assert operators.may_take_triton("auto", features_on("cuda", torch.float32)) == (not obstacle)
    assert not operators.may_take_triton("auto", features_on("cuda", torch.float64))
    assert not operators.may_take_triton("auto", features_on("cpu", torch.float32))
    assert not operators.may_take_triton("tiled", features_on("cuda", torch.float32))


def test_a_device_of_rocm_takes_the_tiled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are written for NVIDIA's."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert operators.obstacle_to_triton(torch.device("cuda", 0)) == "a device of ROCm"
    assert not operators.may_take_triton("auto", features_on("cuda", torch.float32))


def test_only_impl_triton_loads_triton() -> None:
    """No other loss on the CPU does."""
    program = (
        "import sys, torch; from calrobust.functional import multimodal_contrastive_loss as loss;"
        "loss(torch.eye(2), torch.eye(2), 1.0, memory_budget=0); print('calrobust.kernels.triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize(
    ("operands", "capability", "teacher"),
    [
        (torch.bfloat16, 80, True),
        (torch.bfloat16, 90, True),
        (torch.float16, 90, False),
        (torch.float32, 90, True),
        (torch.float64, 80, True),
    ],
)
def test_the_kernels_compile_and_fit_into_shared_memory(operands: torch.dtype, capability: int, teacher: bool) -> None:
    """To machine code, called as a device would call them: what the interpreter lets pass fails here."""
    total = torch.promote_types(operands, torch.float32)
    with torch.device("cpu"), compiled(capability) as kernels:
        softmax: Any = importlib.import_module("calrobust.kernels.triton.softmax")
        models = factors(130, 200, 768, 0, scale=20.0, teacher=teacher)
        inputs = [Factors(*(tensor.to(operands).to(total) for tensor in model)) for model in models]
        rows, columns, none = (torch.ones(n, dtype=total) for n in (130, 200, 0))
        for ours, weights in ((True, columns), (False, none)):
            softmax.forward(inputs, pairs(130, 200).partner, operands, columns=ours)
            softmaxes = [Softmaxes(rows, columns if ours else none, rows, weights, none)] * len(inputs)
            softmax.backward(inputs, softmaxes, pairs(130, 200).partner, operands, [True, True, True])
        biased = [Model(*model, torch.zeros((), dtype=total)) for model in inputs]
        sigmoid: Any = importlib.import_module("calrobust.kernels.triton.sigmoid")
        weights = torch.ones(len(biased), 130, dtype=total)
        sigmoid.sweep(biased, Classes(torch.arange(130), torch.arange(200)), weights, operands, [True] * 4)
        assert len(kernels) == 4
        for kernel in kernels.values():
            assert kernel.asm["cubin"]
            assert kernel.metadata.shared <= 99 * 1024


def batch(n: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Features of student and teacher on the device."""
    return [unit_rows(n, width, seed, dtype).to(DEVICE) for seed in range(4)]


def step(features: list[Tensor], scale: Tensor, **options: Any) -> list[Tensor]:
    """Loss and gradients."""
    image, text, teacher_image, teacher_text = features
    inputs = image.detach().requires_grad_(), text.detach().requires_grad_(), scale.detach().requires_grad_()
    options |= {"label_smoothing": 0.1, "distillation_weight": 1.5}
    loss = carot_loss(*inputs, teacher_image, teacher_text, scale, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


BEYOND_THE_BUDGET = [{"impl": "triton"}, {"impl": "tiled"}, {"impl": "auto", "memory_budget": 0}]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_runs_are_bit_equal(dtype: torch.dtype) -> None:
    """Values and gradients: no atomics, one order of sums."""
    features, scale = batch(3000, 512, dtype), torch.tensor(50.0)
    first = step(features, scale, impl="triton")
    for _ in range(3):
        for a, b in zip(first, step(features, scale, impl="triton"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("options", BEYOND_THE_BUDGET)
def test_nothing_waits_for_the_device(options: dict[str, Any]) -> None:
    """Neither forward nor backward, once kernels are compiled (trap 47)."""
    features, scale = batch(700, 64, torch.bfloat16), torch.tensor(50.0)
    step(features, scale, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(features, scale, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("options", BEYOND_THE_BUDGET)
def test_a_step_is_captured_in_a_cuda_graph(options: dict[str, Any]) -> None:
    """Replayed on other features it gives their loss and gradients (trap 47)."""
    features, scale = batch(700, 64, torch.bfloat16), torch.tensor(50.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(features, scale, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(features, scale, **options)
    for each, other in zip(features, [f.flip(1).roll(1, 0) for f in reversed(features)], strict=True):
        each.copy_(other)
    graph.replay()
    for a, b in zip(captured, step(features, scale, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"impl": "triton"}, {"impl": "tiled"}])
def test_no_pair_matrix_is_held(options: dict[str, Any]) -> None:
    """One float32 matrix of 24,576 pairs is 2.3 GB; with a student and a teacher a step holds less than half of one."""
    n = 24_576
    features, scale = batch(n, 256, torch.bfloat16), torch.tensor(50.0)
    step([each[:512] for each in features], scale, **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(features, scale, **options)
    assert torch.cuda.max_memory_allocated() - before <= 0.5 * 4 * n * n
