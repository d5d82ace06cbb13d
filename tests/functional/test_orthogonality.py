"""OC against its formula and closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, unit_rows
from torch import nn
from torch.testing import assert_close

from calrobust.functional import orthogonality_loss


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=seeds())
def test_is_the_squared_frobenius_norm(rows: int, columns: int, seed: int) -> None:
    """Entry by entry, and its root with squared=False."""
    w = unit_rows(rows, columns, seed)
    gram = [
        [sum(w[k, i] * w[k, j] for k in range(rows)) - float(i == j) for j in range(columns)] for i in range(columns)
    ]
    expected = torch.stack([torch.as_tensor(g) for row in gram for g in row]).square().sum()
    assert_close(orthogonality_loss(w), expected)
    assert_close(orthogonality_loss(w, squared=False), expected.sqrt())


def test_is_of_the_columns_of_a_projection_applied_from_the_right() -> None:
    """Orthonormal columns give 0; orthonormal rows, more columns than rows, cannot."""
    tall = torch.linalg.qr(unit_rows(6, 3, 0))[0]
    assert_close(orthogonality_loss(tall), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-24)
    assert_close(orthogonality_loss(tall.T), torch.tensor(3.0, dtype=torch.float64))


def test_a_linear_layer_is_transposed() -> None:
    """nn.Linear applies x @ weight.T."""
    layer = nn.Linear(6, 3, bias=False, dtype=torch.float64)
    assert_close(orthogonality_loss(layer), orthogonality_loss(layer.weight.T))
    orthogonality_loss(layer).backward()
    assert layer.weight.grad is not None


def test_the_norm_has_a_zero_gradient_at_an_orthonormal_matrix() -> None:
    """Where the square root alone would give NaN (trap 4)."""
    w = torch.eye(4, 3, requires_grad=True)
    naive = (w.T @ w - torch.eye(3)).square().sum().sqrt()
    assert torch.autograd.grad(naive, w)[0].isnan().any()
    (gradient,) = torch.autograd.grad(orthogonality_loss(w, squared=False), w)
    assert (gradient == 0).all()


@pytest.mark.parametrize("squared", [True, False])
def test_passes_gradcheck(squared: bool) -> None:
    """Against finite differences."""
    assert torch.autograd.gradcheck(
        lambda w: orthogonality_loss(w, squared=squared), (unit_rows(4, 3, 0).requires_grad_(),)
    )


def test_low_precision_weights_are_compared_with_the_identity_in_float32() -> None:
    """In autocast too; the gradient comes back in the weight's dtype."""
    w = unit_rows(32, 8, 0, torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = orthogonality_loss(w)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), orthogonality_loss(w.detach().double()), rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss, w)[0].dtype == torch.bfloat16
