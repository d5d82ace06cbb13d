"""Errors name the argument, the rule, what came and the likely fix."""

import sys
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}
ROUNDING = 1e-6  # of probabilities


def can_read_values(tensor: Tensor) -> bool:
    """Whether values may be read; elsewhere it would wait for the device, or break a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_tensor(**tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            fix = "its .to_numpy() and " if hasattr(value, "to_numpy") else ""
            raise TypeError(f"{name} must be a torch.Tensor, got {kind}; convert it with {fix}torch.as_tensor")
        if value.is_nested or value.layout != torch.strided:
            kind = "a nested one" if value.is_nested else str(value.layout)
            raise TypeError(f"{name} must be a dense tensor, got {kind}; convert it with .to_dense(), or pad it")


def check_floating(**tensors: Tensor) -> None:
    check_tensor(**tensors)
    for name, value in tensors.items():
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            rule = " of at least 16 bits" if value.is_floating_point() else ""
            raise TypeError(f"{name} must be floating point{rule}, got {value.dtype}; convert it with .float()")


def check_not_meta(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{name} must have values, got a meta tensor; load or initialise the model first")


def check_bool(**tensors: Any) -> None:
    check_tensor(**tensors)
    for name, value in tensors.items():
        if value.dtype != torch.bool:
            raise TypeError(f"{name} must have dtype torch.bool, got {value.dtype}; convert it with .bool()")


def check_number(**numbers: Any) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a real number, got {type(value).__name__} {value!r}")
        number: Any = value if isinstance(value, (int, float)) else float(value)  # NumPy's float32 could overflow
        if not abs(number) <= sys.float_info.max:  # NaN too
            raise ValueError(f"{name} must be finite, got {value!r}")


def check_integer(least: int, most: int = 2**63 - 1, **numbers: Any) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
        if int(value) < least:
            raise ValueError(f"{name} must be >= {least}, got {value!r}")
        if int(value) > most:
            raise ValueError(f"{name} must be at most {most:,}, got {value!r}; was another number meant?")


def check_float64(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.device.type in WITHOUT_FLOAT64:
            rule = "on a device that has float64, in which sums are taken"
            raise ValueError(f"{name} must be {rule}, got {value.device}; move it with .cpu()")


def check_one_device(**tensors: Tensor) -> None:
    devices, both = [str(value.device) for value in tensors.values()], " and ".join
    if len(set(devices)) > 1:
        raise ValueError(f"{both(tensors)} must be on one device, got {both(devices)}; move one with .to()")


def check_positive(**numbers: Any) -> None:
    check_number(**numbers)
    for name, value in numbers.items():
        if value <= 0:
            raise ValueError(f"{name} must be > 0, got {value!r}")


def check_n_bins(n_bins: Any) -> None:
    check_integer(1, 10**6, n_bins=n_bins)


def check_fraction(*, closed: bool, **numbers: Any) -> None:
    check_number(**numbers)
    for name, value in numbers.items():
        if not 0 <= value <= 1 or (value == 1 and not closed):
            hint = f"; did you mean {value / (10 if value <= 10 else 100):g}?" if 1 <= value <= 100 else ""
            raise ValueError(f"{name} must be in [0, 1{']' if closed else ')'}, got {value!r}{hint}")


def check_flag(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")


def check_choice(choices: Sequence[str], **options: Any) -> None:
    for name, value in options.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_labels(length: int, device: torch.device, further: Sequence[int] = (), **labels: Any) -> None:
    shape = [length, *further]
    for name, value in labels.items():
        if isinstance(value, (str, list, tuple)) and str in map(type, value):
            raise TypeError(f"{name} must be a torch.Tensor, got texts; number them, equal ones alike")
        check_tensor(**{name: value})
        deep = value.ndim > len(shape)
        if value.dtype != torch.int64 and not deep:
            raise TypeError(f"{name} must have dtype torch.int64, got {value.dtype}; convert it with .long()")
        if list(value.shape) != shape:
            fix = f"; pass {name}.argmax(1) if it is one-hot, {name}.squeeze(1) if it is a column" if deep else ""
            raise ValueError(f"{name} must have shape {shape}, one label for each row, got {list(value.shape)}{fix}")
        if value.device != device:
            raise ValueError(
                f"{name} must be on {device}, as the rows it labels, got {value.device}; move it with .to()"
            )


def check_predictions(target: Any, **preds: Any) -> None:
    for name, value in preds.items():
        if isinstance(value, Tensor) and value.dtype == torch.int64:
            raise TypeError(f"{name} must be floating point, got {value.dtype}; pass the scores first, then the labels")
        check_floating(**{name: value})
        if value.ndim < 2:
            raise ValueError(
                f"{name} must have shape [N, C, ...], one row for each sample and one column for each class, got "
                f"{list(value.shape)}; add the dimension that is missing with .unsqueeze()"
            )
        if value.shape[1] < 2:
            raise ValueError(
                f"{name} must have a column for each of two classes or more, got shape {list(value.shape)}; for a "
                f"single logit of the class 1 pass torch.cat((torch.zeros_like({name}), {name}), 1), for a single "
                f"probability torch.cat((1 - {name}, {name}), 1)"
            )
        check_labels(len(value), value.device, value.shape[2:], target=target)


def check_ignore_index(ignore_index: Any) -> None:
    if ignore_index is not None:
        check_integer(-(2**63), ignore_index=ignore_index)


def check_label_values(target: Tensor, n_classes: int) -> None:
    """Reads values."""
    outside = (target < 0) | (target >= n_classes)
    if outside.any():
        first = int(target[outside][0])
        raise ValueError(
            f"target must be in [0, {n_classes}), one of the C classes, got {first}; drop these samples, or pass "
            f"ignore_index={first} where it is an option"
        )


def check_softmax_exists(target: Tensor, **preds: Tensor) -> None:
    """Reads values."""
    for name, value in preds.items():
        faults = {"NaN": value.isnan().any(1), "+inf": value.isposinf().any(1)}
        faults["-inf in every class"] = value.isneginf().all(1)
        for fault, wrong in faults.items():
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"{name} must be finite, or -inf in masked classes, got {fault} in row {row}, whose label is "
                    f"{int(target[row])}; drop such rows, or find where the model overflows"
                )


def _outside(low: Tensor, high: Tensor) -> Tensor:
    return (low < -ROUNDING) | (high > 1 + ROUNDING)


def _may_be_probabilities(rows: Tensor) -> Tensor:
    # True for NaN.
    low, high = rows.aminmax(dim=1)
    off = (rows.sum(1, dtype=torch.float64) - 1).abs()
    wrong = _outside(low, high) | (off > 1 / 64)  # more than in bfloat16
    doubtful = (wrong & (low >= 0) & (high <= 1) & (off <= 0.5)).nonzero()[:, 0]
    for step in (1e-2, 1e-3, 1e-4) if len(doubtful) else ():  # read from text
        steps = rows[doubtful].double() / step
        printed = ((steps - steps.round()).abs() < 2e-3).all(1) & (off[doubtful] <= 0.501 * step * rows.shape[1])
        wrong[doubtful[printed]] = False
    return ~wrong


def _cannot_be_logits(rows: Tensor) -> bool:
    # C logits in [0, 1] sum to 1 within d with a chance of at most 100 * d / C.
    n_classes = rows.shape[1]
    # The first row settles most cases.
    if _outside(*rows[0].aminmax()) or not _may_be_probabilities(rows).all():
        return False
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    precision = next((dtype for dtype in narrow if torch.equal(rows.to(dtype).to(rows.dtype), rows)), torch.float64)
    off = (rows.sum(1, dtype=torch.float64) - 1).abs().max().clamp(min=torch.finfo(precision).eps / 4)
    chance = min(1.0, max(2e-5, (n_classes / 1000) ** 3))
    return bool(off <= n_classes / 100 * chance ** (1 / len(rows[:64].unique(dim=0))))


def check_kind(*, from_logits: bool, **scores: Tensor) -> None:
    """Reads values."""
    for name, value in scores.items():
        if from_logits and len(value) and _cannot_be_logits(value):
            raise ValueError(
                f"{name} must be logits, got rows in [0, 1] that sum to 1; if they are probabilities, pass "
                f"{name}.log() or, where there is that option, from_logits=False; if they are logits after all, pass "
                f"{name} + 1, which has the same softmax"
            )
        if not from_logits and (wrong := ~_may_be_probabilities(value)).any():
            row = value[wrong][0].double()
            low, high, total = row.min(), row.max(), row.sum()
            scale = "divide each row by its sum if these are probabilities, " if low >= 0 and high <= 1 else ""
            raise ValueError(
                f"{name} must be probabilities with from_logits=False: rows in [0, 1] that sum to 1, got a row from "
                f"{low:.4g} to {high:.4g} that sums to {total:.4g}; {scale}set from_logits=True if these are logits"
            )


def check_bins(bins: Any) -> None:
    if not isinstance(bins, tuple) or len(bins) != 3:
        raise TypeError(
            f"bins must be a tuple of three sums, got {type(bins).__name__}; "
            "see functional.bin_confidences, or ShiftReport.bins"
        )
    named = {f"bins[{i}]": sums for i, sums in enumerate(bins)}
    check_floating(**named)
    check_float64(**named)
    shapes = [list(sums.shape) for sums in bins]
    if not shapes[0] or 0 in shapes[0] or shapes != [shapes[0]] * 3:
        raise ValueError(
            f"bins must be sums of one shape [..., n_bins], got {', '.join(map(str, shapes))}; "
            "take them from one call of bin_confidences"
        )
    check_one_device(**named)


def warn(message: str) -> None:
    """Warns at the line of the user's call, and names what was called."""
    frame, level, called = sys._getframe(1), 2, ""
    while frame.f_back and (home := str(frame.f_globals.get("__name__")).split(".")[0]) in ("calrobust", "torch"):
        if home == "calrobust":
            called = frame.f_code.co_qualname.removesuffix(".__init__")
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{message} ({called})", stacklevel=level)


def check_instance(kind: type, fix: str, **objects: Any) -> None:
    for name, value in objects.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}; {fix}")
