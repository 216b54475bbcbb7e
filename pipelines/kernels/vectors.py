"""Operations on several lanes at once that Numba does not find by itself, written in LLVM's own terms."""

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT = ir.FloatType()
_BYTE = ir.IntType(8)
_INT = ir.IntType(32)
_SHORT = ir.IntType(16)
_SIXTEEN = ir.VectorType(_BYTE, 16)
_WIDE = ir.VectorType(_FLOAT, 16)
_FLOATS = ir.VectorType(_FLOAT, 4)
_BYTES = ir.VectorType(_BYTE, 4)
_PAIR = ir.VectorType(_FLOAT, 8)
_FOUR, _EIGHT = ir.VectorType(_INT, 4), ir.VectorType(_INT, 8)


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


@intrinsic
def copy_bytes(typing: Any, source: Any, place: Any, target: Any, other: Any, count: Any) -> Any:
    """Copy `count` bytes from index `place` of one uint8 array to index `other` of another, which lies elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def locate(array: int) -> Any:
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.gep(data, [arguments[array + 1]])

        cgutils.raw_memcpy(builder, locate(2), locate(0), arguments[4], 1)
        return context.get_dummy_value()

    return types.void(source, place, target, other, count), generate


@intrinsic
def has_byte_255(typing: Any, array: Any, place: Any) -> Any:
    """Whether one of the sixteen bytes of a uint8 array from index `place` on is 255."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        lanes = builder.bitcast(builder.gep(data, [arguments[1]]), _SIXTEEN.as_pointer())
        found = builder.icmp_unsigned("==", builder.load(lanes, align=1), ir.Constant(_SIXTEEN, [255] * 16))
        return builder.icmp_unsigned("!=", builder.bitcast(found, _SHORT), ir.Constant(_SHORT, 0))

    return types.boolean(array, place), generate


@intrinsic
def stream_scaled(
    typing: Any, source: Any, place: Any, factors: Any, offsets: Any, first: Any, target: Any, other: Any
) -> Any:
    """Write 16 uint8 of `source` from `place`, times float32 `factors` plus `offsets` from `first`, past the caches.

    `target` from index `other` is float32 and lies at a multiple of 16 bytes; what follows such writes needs `settle`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def locate(array: int, index: int, element: ir.Type) -> Any:
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [arguments[index]]), element.as_pointer())

        values = builder.uitofp(builder.load(locate(0, 1, _SIXTEEN), align=1), _WIDE)
        factor, offset = (builder.load(locate(array, 4, _WIDE), align=4) for array in (2, 3))
        scaled = builder.fadd(builder.fmul(values, factor, flags=("fast",)), offset, flags=("fast",))
        store = builder.store(scaled, locate(5, 6, _WIDE), align=16)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT, 1)]))
        return context.get_dummy_value()

    return types.void(source, place, factors, offsets, first, target, other), generate


@intrinsic
def settle(typing: Any) -> Any:
    """Other threads see all that was written before what is written from here on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def weighted_pixels(taps: int) -> Callable[..., None]:
    """A kernel that writes a pixel of two images each, as weighted sums of `taps` neighbours in a row.

    It takes (row, other_row, start, step, weights, first, pixels, place, line, other_place): two float32 rows of
    interleaved colours, of which `taps` pixels from index `start` on, `step` values apart, count; float32 `weights`
    from index `first`; and writes uint8 `pixels` at `place` and `line` at `other_place`, rounded. Four bytes each are
    written. Where a pixel has three, the fourth means nothing: the next pixel overwrites it, and after the last one
    there must be room.
    """

    @intrinsic
    def kernel(
        typing: Any,
        row: Any,
        other_row: Any,
        start: Any,
        step: Any,
        weights: Any,
        first: Any,
        pixels: Any,
        place: Any,
        line: Any,
        other_place: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def locate(array: int, index: int, element: ir.Type) -> Any:
                data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
                return builder.bitcast(builder.gep(data, [arguments[index]]), element.as_pointer())

            sources = [locate(array, 2, _FLOAT) for array in (0, 1)]
            factors = locate(4, 5, _FLOAT)
            total = ir.Constant(_PAIR, [0.0] * 8)
            for tap in range(taps):
                away = builder.mul(arguments[3], ir.Constant(arguments[3].type, tap))
                lanes = [
                    builder.load(builder.bitcast(builder.gep(source, [away]), _FLOATS.as_pointer()), align=4)
                    for source in sources
                ]
                both = builder.shuffle_vector(*lanes, ir.Constant(_EIGHT, list(range(8))))
                single = builder.load(builder.gep(factors, [ir.Constant(_INT, tap)]))
                one = builder.insert_element(ir.Constant(_PAIR, ir.Undefined), single, ir.Constant(_INT, 0))
                factor = builder.shuffle_vector(one, one, ir.Constant(_EIGHT, [0] * 8))
                total = builder.fadd(total, builder.fmul(factor, both, flags=("fast",)), flags=("fast",))
            # Weights that add up to one cannot leave 0 to 255 by as much as a half, so nothing has to be clamped.
            rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_PAIR, [_PAIR]), "llvm.rint.v8f32")
            rounded = builder.trunc(builder.fptosi(builder.call(rint, [total]), _EIGHT), ir.VectorType(_BYTE, 8))
            for array, lowest in ((6, 0), (8, 4)):
                half = ir.Constant(_FOUR, list(range(lowest, lowest + 4)))
                builder.store(builder.shuffle_vector(rounded, rounded, half), locate(array, array + 1, _BYTES), align=1)
            return context.get_dummy_value()

        given = (row, other_row, start, step, weights, first, pixels, place, line, other_place)
        return types.void(*given), generate

    function: Callable[..., None] = kernel
    return function
