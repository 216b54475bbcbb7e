"""What a pickle of weights would do, worked out from its operations before PyTorch does it.

PyTorch's `weights_only` runs no foreign code, but it makes what a file asks for: a bytearray of any length in thirty
bytes, or a copy of one large list for every six bytes. Here the operations are followed on a stack that holds only the
kinds of the values (https://docs.python.org/3/library/pickletools.html), and nothing is let through that would take
more than its own bytes in the file.
"""

import io
import pickletools
from typing import NamedTuple

_ELEMENT_BYTES = {
    f"torch {name}Storage": size
    for size, names in {
        1: ("Bool", "Byte", "Char"),
        2: ("BFloat16", "Half", "Short"),
        4: ("Float", "Int"),
        8: ("ComplexFloat", "Double", "Long"),
        16: ("ComplexDouble",),
    }.items()
    for name in names
}
_DTYPES = frozenset(
    "torch " + name
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "float16", "float32", "float64"),
        *("complex64", "complex128"),
    )
)
_TENSORS = "torch._utils _rebuild_"
# Each takes a bounded time, as long as the shapes that it is given are short. Sparse and meta tensors are refused
# later, where their names are known.
_BUILDERS = frozenset(
    {
        *(_TENSORS + name for name in ("tensor", "tensor_v2", "parameter", "sparse_tensor", "meta_tensor_no_storage")),
        *("torch Size", "torch device", "torch.serialization _get_layout", "torch.nn.parameter Parameter"),
    }
)
# These copy what they are given. A counter lies in the state of a scheduler.
_COPIERS = frozenset({"collections OrderedDict", "collections Counter"})
_KNOWN = _BUILDERS | _COPIERS | _DTYPES | _ELEMENT_BYTES.keys()

# ResNet-101 with AdamW's state and an average has 72,000.
_MOST_OPERATIONS = 1_000_000
# Of all tuples of a call: two of 64 dimensions, which are PyTorch's most, and the rest.
_MOST_ARGUMENTS = 256
# Tuples are compared by recursion, and a few bytes can write one that holds the same one a thousand times, and so on.
_DEEPEST, _HEAVIEST = 16, 4096
_LITERALS = frozenset(
    {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
    | {"SHORT_BINSTRING"}
)
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_EMPTY = {"EMPTY_DICT": "dict", "EMPTY_LIST": "list"}


class RefusedError(Exception):
    """What the pickle would do, to go behind "unpickling it would"."""


class _Value(NamedTuple):
    """Attributes:
    kind: "literal", "dict", "list", "tuple", "storage", "global NAME", or "made NAME" by that function.
    items: of a tuple. value: of a literal.
    depth, weight: of tuples in tuples; their number of items altogether. bulky: a list or dict is among them.
    fresh: written out where it stands; not fetched from the memo, and not made by a function.
    """

    kind: str
    items: tuple["_Value", ...] = ()
    value: object = None
    depth: int = 0
    weight: int = 1
    bulky: bool = False
    fresh: bool = True


class _Machine:
    """Follows the operations of one pickle."""

    def __init__(self) -> None:
        self.storages: dict[object, int] = {}
        self._stack: list[_Value] = []
        self._marks: list[list[_Value]] = []
        self._memo: dict[object, _Value] = {}

    def step(self, name: str, argument: object) -> None:
        """Do one operation; raises RefusedError, or IndexError for a stack that is too short."""
        stack = self._stack
        if name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]._replace(fresh=False)
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise IndexError("it fetches what it has not put")
            stack.append(self._memo[argument])
        elif name in _LITERALS:
            stack.append(_Value("literal", value=argument))
        elif name in _EMPTY:
            stack.append(_Value(_EMPTY[name], bulky=True))
        elif name in _TUPLES:
            self._tuple([stack.pop() for _ in range(_TUPLES[name])][::-1])
        elif name == "TUPLE":
            self._tuple(self._since_mark())
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in ("APPENDS", "SETITEMS"):
            items = self._since_mark()
            self._changed("list" if name == "APPENDS" else "dict", items[::2])
        elif name == "APPEND":
            self._changed("list", [stack.pop()])
        elif name == "SETITEM":
            stack.pop()
            self._changed("dict", [stack.pop()])
        elif name == "GLOBAL":
            if argument not in _KNOWN:
                raise RefusedError(f"run {'.'.join(str(argument).split(' '))}")
            stack.append(_Value(f"global {argument}"))
        elif name in ("REDUCE", "NEWOBJ"):
            self._call()
        elif name == "BUILD":
            self._build()
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "STOP"):
            raise RefusedError(f"do {name}, which torch.save does not write")

    def _since_mark(self) -> list[_Value]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple(self, items: list[_Value]) -> None:
        depth = 1 + max((item.depth for item in items), default=0)
        weight = 1 + sum(item.weight for item in items)
        if depth > _DEEPEST or weight > _HEAVIEST:
            raise RefusedError(f"make tuples in tuples, {depth} deep and of {weight:,} items")
        bulky = any(item.bulky for item in items)
        self._stack.append(_Value("tuple", tuple(items), depth=depth, weight=weight, bulky=bulky))

    def _changed(self, kind: str, keys: list[_Value]) -> None:
        target = self._stack[-1].kind
        if target not in (kind, *(f"made {name}" for name in _COPIERS)):
            raise RefusedError(f"change a {target} as if it were a {kind}")
        if kind == "dict" and any(key.kind != "literal" for key in keys):
            raise RefusedError("look up what is neither a name nor a number")

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        name = function.kind.removeprefix("global ")
        given = arguments.items
        if name in _COPIERS:
            allowed = arguments.fresh and all(item.fresh and item.kind in ("list", "dict") for item in given)
        elif name == "torch Size":
            allowed = arguments.weight <= _MOST_ARGUMENTS and all(item.kind == "tuple" for item in given)
        else:
            allowed = name in _BUILDERS and arguments.weight <= _MOST_ARGUMENTS
        if not allowed or arguments.kind != "tuple" or (arguments.bulky and name not in _COPIERS):
            raise RefusedError(f"call {name.replace(' ', '.')} with what it is not called with for weights")
        self._stack.append(_Value(f"made {name}", fresh=False))

    def _build(self) -> None:
        """Attributes of an OrderedDict (a state_dict has versions in `_metadata`); of the Parameters of 2017."""
        state = self._stack.pop()
        target = self._stack[-1].kind
        if target == "made collections OrderedDict":
            allowed = state.kind == "dict" and state.fresh
        else:
            short = state.kind == "tuple" and state.weight <= _MOST_ARGUMENTS and not state.bulky
            allowed = short and target == "made torch.nn.parameter Parameter"
        if not allowed:
            raise RefusedError(f"give attributes to a {target}, from a {state.kind}")

    def _storage(self, address: _Value) -> _Value:
        """Of ("storage", type, key, device, number of elements, and in old files a view)."""
        parts = address.items
        if len(parts) in (5, 6) and parts[0].value in ("storage", b"storage"):
            size, count = _ELEMENT_BYTES.get(parts[1].kind.removeprefix("global ")), parts[4].value
            if size is not None and isinstance(count, int) and count >= 0 and parts[2].kind == "literal":
                key = parts[2].value
                self.storages[key] = max(self.storages.get(key, 0), count * size)
                return _Value("storage", fresh=False)
        raise RefusedError("read a storage of a kind that weights do not have")


def check(stream: io.BytesIO, count: int, most_bytes: int) -> None:
    """Follow `count` pickles that lie in a row.

    Args:
        most_bytes: that all their tensors together may take.

    Raises:
        RefusedError: one would do what loading weights does not need, or take more than its share of memory.
        ValueError, IndexError: damaged, or too short.
    """
    steps = 0
    for _ in range(count):
        machine = _Machine()
        for operation, argument, _ in pickletools.genops(stream):
            steps += 1
            if steps > _MOST_OPERATIONS:
                raise RefusedError(f"take more than {_MOST_OPERATIONS:,} steps")
            machine.step(operation.name, argument)
        wanted = sum(machine.storages.values())
        if wanted > most_bytes:
            raise RefusedError(f"take {wanted:,} bytes of tensors, of a file of {most_bytes:,}")
