"""Temperature scaling as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from calrobust._checks import check_float64, check_floating
from calrobust.functional.scoring import fit_temperature


class TemperatureScaler(nn.Module):
    r"""Divides logits by a temperature that was fitted on held-out data.

    .. math:: z \mapsto z / T, \qquad T = \arg\min_{T > 0} \mathrm{NLL}(z_\mathrm{val} / T)

    Division keeps the order of the classes, hence the accuracy, and changes the confidences. T is a buffer, not a
    parameter: no optimizer sees it, and it stays float64 when the module is cast. Fit on data that you do not report.

    Example:
        >>> import torch
        >>> from calrobust import TemperatureScaler
        >>> val_logits, val_target = torch.tensor([[8.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
        >>> scaler = TemperatureScaler().fit(val_logits, val_target)
        >>> scaler(torch.tensor([[8.0, 0.0]])).softmax(1)  # three of four were of class 0
        tensor([[0.7500, 0.2500]])
    """

    temperature: Tensor
    """T, a float64 scalar; 1 before :meth:`fit`."""

    is_fitted: bool
    """Whether :meth:`fit` has run, or the state of a fitted scaler was loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        self.is_fitted = False  # not a buffer: forward reads it, and reading a tensor would wait for the device

    def fit(self, logits: Tensor, target: Tensor) -> TemperatureScaler:
        """Sets T to :func:`~calrobust.functional.fit_temperature` of held-out data and returns the scaler itself.

        Arguments, errors and warnings are those of the function. :func:`~calrobust.collect_logits` collects logits.
        """
        fitted = fit_temperature(logits, target)
        with torch.inference_mode(False):  # a buffer made in inference mode could not be used outside
            self.temperature = fitted.clone().to(self.temperature.device)
        self.is_fitted = True
        return self

    def forward(self, logits: Tensor) -> Tensor:
        """Divides logits of any shape by T; keeps their dtype and is differentiable in them.

        Raises:
            RuntimeError, TypeError: the scaler is not fitted, or ``logits`` is not floating.
        """
        if not self.is_fitted:
            raise RuntimeError(
                "TemperatureScaler is not fitted; call fit(val_logits, val_target) or load a fitted state"
            )
        check_floating(logits=logits)
        return logits / self.temperature

    def extra_repr(self) -> str:
        """T, or that there is none yet."""
        return f"temperature={self.temperature.item():.6g}" if self.is_fitted else "not fitted"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemperatureScaler:
        # .half() and .to(dtype) are for weights. T only changes its device.
        check_float64(scaler=fn(torch.empty(0, device=self.temperature.device)))
        temperature = self.temperature
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.temperature.dtype != temperature.dtype:
            self.temperature = temperature.to(self.temperature.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "is_fitted"] = torch.tensor(self.is_fitted)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = prefix + "is_fitted"
        is_fitted = state_dict.pop(name, None)  # nn.Module has no such buffer and would refuse the key
        super()._load_from_state_dict(state_dict, prefix, *args)
        if is_fitted is None:
            _, _, missing_keys, *_ = args
            missing_keys.append(name)
        else:
            self.is_fitted = bool(is_fitted)
