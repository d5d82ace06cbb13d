"""The forms for CUDA devices, as Triton kernels: `softmax` and `sigmoid`, which share `blocks`."""

from calrobust.kernels.triton.blocks import INTERPRETED
from calrobust.kernels.triton.sigmoid import sigmoid_sums
from calrobust.kernels.triton.softmax import backward, forward

__all__ = ["INTERPRETED", "backward", "forward", "sigmoid_sums"]
