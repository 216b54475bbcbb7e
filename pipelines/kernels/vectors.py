"""Operations on four lanes at once that Numba does not find by itself, written in LLVM's own terms."""

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT = ir.FloatType()
_BYTE = ir.IntType(8)
_INT = ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, 4)
_BYTES = ir.VectorType(_BYTE, 4)
_INTS = ir.VectorType(_INT, 4)
_FIRST = ir.Constant(_INTS, [0, 0, 0, 0])


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """The address, an unsigned integer, as a pointer to the element type of the array `like`."""
    target = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(target))

    return target(address, like), generate


@intrinsic
def copy_pixel(typing: Any, source: Any, place: Any, target: Any, other: Any) -> Any:
    """Copy four bytes, a pixel and one more, from index `place` of one uint8 array to index `other` of another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def locate(array: int) -> Any:
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [arguments[array + 1]]), _INT.as_pointer())

        builder.store(builder.load(locate(0), align=1), locate(2), align=1)
        return context.get_dummy_value()

    return types.void(source, place, target, other), generate


def weighted_pixel(taps: int) -> Callable[..., None]:
    """A kernel that writes one pixel as the weighted sum of `taps` neighbours in a row.

    It takes (row, start, weights, first, pixels, place): float32 `row` of interleaved RGB from index `start`, float32
    `weights` from index `first`, and writes uint8 `pixels` at index `place`, rounded. Four bytes are written, of which
    the fourth means nothing: the next pixel overwrites it, and after the last one there must be room.
    """

    @intrinsic
    def kernel(typing: Any, row: Any, start: Any, weights: Any, first: Any, pixels: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def locate(array: int, element: ir.Type) -> Any:
                data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
                return builder.bitcast(builder.gep(data, [arguments[array + 1]]), element.as_pointer())

            source, factors, target = locate(0, _FLOAT), locate(2, _FLOAT), locate(4, _BYTES)
            total = ir.Constant(_FLOATS, [0.0, 0.0, 0.0, 0.0])
            for tap in range(taps):
                lanes = builder.bitcast(builder.gep(source, [ir.Constant(_INT, 3 * tap)]), _FLOATS.as_pointer())
                single = builder.load(builder.gep(factors, [ir.Constant(_INT, tap)]))
                one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), single, ir.Constant(_INT, 0))
                factor = builder.shuffle_vector(one, one, _FIRST)
                product = builder.fmul(factor, builder.load(lanes, align=4), flags=("fast",))
                total = builder.fadd(total, product, flags=("fast",))
            # Weights that add up to one cannot leave 0 to 255 by as much as a half, so nothing has to be clamped.
            rint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), "llvm.rint.v4f32"
            )
            rounded = builder.call(rint, [total])
            builder.store(builder.trunc(builder.fptosi(rounded, _INTS), _BYTES), target, align=1)
            return context.get_dummy_value()

        return types.void(row, start, weights, first, pixels, place), generate

    function: Callable[..., None] = kernel
    return function
