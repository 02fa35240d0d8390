"""Reads the pickles inside a .pth file into inert records; nothing that they name is imported or called.

A pickle is a program for a stack machine that can call any function by its name. `Reader` steps through the opcodes
(pickletools only decodes them) and knows just the few that a table of tensors needs; an opcode that it doesn't know,
or a name outside GLOBALS, is refused.
"""

import io
import pickletools
import struct
from dataclasses import dataclass
from typing import Any

MAX_OPCODES = 3_000_000  # a ResNet50 has 20,000; a hostile file could keep us busy for hours
DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "bool",
}
GLOBALS = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in DTYPES),
}


class RefusedError(Exception):
    """The file holds something that a table of tensors doesn't; becomes a UserError that names the file."""


@dataclass(frozen=True, eq=False)
class Name:
    """A global that the file mentions, as text."""

    text: str


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of numbers: `count` of them from `start` in the storage `key`."""

    key: str
    dtype: str
    total: int
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A strided view of a storage, not yet read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Reader:
    """Steps through one pickle and builds inert records; `keys` collects the storages it mentions, with their dtype."""

    def __init__(self, stream: io.BytesIO):
        self.stream = stream
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.keys: dict[str, str] = {}

    def load(self) -> Any:
        """The object that the pickle, from the stream's position to its STOP, describes; raises RefusedError."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.stream)):
                if opcode.name == "STOP":
                    return self.pop()
                if count > MAX_OPCODES:
                    raise RefusedError("its table of tensors is implausibly long")
                self.step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
            raise RefusedError(f"damaged or truncated table of tensors ({str(error)[:80]})") from None
        raise RefusedError("truncated table of tensors")

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(_LITERALS[opcode](argument))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise RefusedError(f"its pickle uses {opcode}, which no table of tensors needs; it will not be run")

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("nothing on the stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def find(self, text: str) -> None:
        if text not in GLOBALS:
            raise RefusedError(
                f"it asks for {text[:80].replace(' ', '.')}, which is no part of a tensor; it will not be run"
            )
        self.stack.append(Name(text))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        # Hashing a nested tuple can take for ever, so keys are plain.
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in items[::2]):
            raise ValueError("items of no dictionary")
        target.update(zip(items[::2], items[1::2], strict=True))

    def append_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items of no list")
        self.stack[-1].extend(items)

    def build(self) -> None:
        self.pop()  # attributes, such as the _metadata of a state dict, say nothing about tensors
        if not isinstance(self.stack[-1], dict):
            raise RefusedError("it sets attributes of something that is not a dictionary")

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of no function")
        name = function.text.rpartition(" ")[2]
        if name == "OrderedDict" and not arguments:
            result = {}
        elif name == "Size":
            result = _integers(arguments[0])
        elif name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, Storage):
                raise ValueError("a tensor without a storage")
            result = Tensor(storage, _integers((offset,))[0], _integers(shape), _integers(strides))
        elif name == "_rebuild_parameter" and isinstance(arguments[0], Tensor):
            result = arguments[0]
        else:
            raise RefusedError(f"it calls {name} in an unknown way")
        self.stack.append(result)

    def persistent(self) -> None:
        """A storage: ("storage", class, key, device, count) and, in old files, a part (key, start, count) of it."""
        word, kind, key, _, total, *view = self.pop()
        dtype = DTYPES[kind.text.rpartition(" ")[2]] if isinstance(kind, Name) else None
        if word != "storage" or dtype is None or not isinstance(key, str) or self.keys.setdefault(key, dtype) != dtype:
            raise ValueError("a reference to no storage")
        start, count = _integers(view[0][1:]) if view and view[0] is not None else (0, total)
        self.stack.append(Storage(key, dtype, *_integers((total, start, count))))


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > 16 or not all(type(value) is int for value in values):
        raise ValueError("sizes that are not whole numbers")
    return tuple(values)


_LITERALS = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
}
_PLAIN = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING")
_LITERALS |= dict.fromkeys(_PLAIN, lambda argument: argument)
_ACTIONS = {
    "MARK": lambda reader, _: reader.marks.append(len(reader.stack)),
    "TUPLE": lambda reader, _: reader.stack.append(tuple(reader.pop_to_mark())),
    "TUPLE1": lambda reader, _: reader.stack.append((reader.pop(),)),
    "TUPLE2": lambda reader, _: reader.stack.append((reader.pop(), reader.pop())[::-1]),
    "TUPLE3": lambda reader, _: reader.stack.append((reader.pop(), reader.pop(), reader.pop())[::-1]),
    "SETITEM": lambda reader, _: reader.set_items([reader.pop(), reader.pop()][::-1]),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_to_mark()),
    "APPEND": lambda reader, _: reader.append_items([reader.pop()]),
    "APPENDS": lambda reader, _: reader.append_items(reader.pop_to_mark()),
    "GLOBAL": lambda reader, text: reader.find(text),
    "STACK_GLOBAL": lambda reader, _: reader.find(" ".join((reader.pop(), reader.pop())[::-1])),
    "MEMOIZE": lambda reader, _: reader.memo.__setitem__(len(reader.memo), reader.stack[-1]),
    "REDUCE": lambda reader, _: reader.call(),
    "BUILD": lambda reader, _: reader.build(),
    "BINPERSID": lambda reader, _: reader.persistent(),
}
