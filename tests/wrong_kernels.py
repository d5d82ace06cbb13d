"""Parts of the Triton kernels with a mistake each, for the tests that look whether it is found."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # then nobody asks
    pass
else:

    @triton.jit
    def _weighted_softmaxes(softmaxes: Any, s: Any, row: Any, column: Any, n: Any, m: Any, columns: Any) -> Any:
        return tl.zeros_like(s)

    @triton.jit
    def _times(u: Any, v: Any, teacher: tl.constexpr) -> Any:
        return u[0] * v[0], u[1] * v[1], u[2] * v[2]
