"""Arithmetic that has to be rounded in one way, whatever the compiler would make of it."""

from typing import Any

from numba import types
from numba.extending import intrinsic


@intrinsic
def fused(typing: Any, factor: Any, other: Any, addend: Any) -> Any:
    """factor * other + addend in float32, rounded once: what a processor's fused multiply-add gives."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate
