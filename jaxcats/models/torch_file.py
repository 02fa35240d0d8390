"""Reads the pickles inside a .pth file into inert records; nothing that they name is imported or called.

A pickle is a program for a stack machine that can call any function by its name. `Reader` steps through the opcodes
(pickletools only decodes them) and knows just the few that a table of tensors needs; an opcode that it doesn't know,
or a name outside GLOBALS, is refused.
"""

import io
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.common.errors import UserError

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

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def load_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that torch.save wrote, by name; bfloat16 becomes float32.

    The state dict may be the file's top object or stand in it under "state_dict" or "model". The arrays are read-only
    and may share memory. Raises UserError, naming the file and the reason, for anything else: truncated files, other
    pickled objects, sparse or quantised tensors, big-endian files.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        top, raw = _read_zip(data) if data[:4] == b"PK\x03\x04" else _read_legacy(data)
        return _materialise(_state_dict(top), raw)
    except RefusedError as error:
        said = str(error)  # a library may quote the whole file, or a name of any length in it
        raise UserError(f"{path}: {said[:300]}{'...' if len(said) > 300 else ''}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory") from None


# --- the two layouts: each gives the top object and the bytes of each storage ---


def _read_zip(data: bytes) -> tuple[Any, dict[str, memoryview]]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as error:
        raise RefusedError(f"damaged or truncated zip file ({error})") from None
    tables = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(tables) != 1:
        raise RefusedError("a zip file, but not one by torch.save (it should hold one data.pkl)")
    folder = tables[0].removesuffix("data.pkl")
    budget = len(data)

    def read(name: str) -> memoryview:
        nonlocal budget
        info = entries.get(name)
        if info is None:
            raise RefusedError(f"damaged: it has no {name}")
        # torch.save never compresses, so the contents can't be larger than the file.
        budget -= info.file_size
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or budget < 0:
            raise RefusedError(f"{name} is compressed or overlaps other contents; torch.save doesn't write that")
        try:
            return memoryview(archive.read(info))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, struct.error, EOFError) as error:
            raise RefusedError(f"damaged or truncated at {name} ({error})") from None

    if f"{folder}byteorder" in entries and bytes(read(f"{folder}byteorder")) != b"little":
        raise RefusedError("written on a big-endian machine, which is not supported")
    reader = Reader(io.BytesIO(read(f"{folder}data.pkl")))
    top = reader.load()
    return top, {key: read(f"{folder}data/{key}") for key in reader.keys}


def _read_legacy(data: bytes) -> tuple[Any, dict[str, memoryview]]:
    stream = io.BytesIO(data)
    try:
        magic = Reader(stream).load()
    except RefusedError:
        magic = None
    if magic != LEGACY_MAGIC:
        raise RefusedError(f"not a file by torch.save (it begins with {data[:8]!r})")
    protocol, system = Reader(stream).load(), Reader(stream).load()
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise RefusedError("an unknown version of torch's old file format")
    if system.get("little_endian") is not True:
        raise RefusedError("written on a big-endian machine, which is not supported")
    reader = Reader(stream)
    top, keys = reader.load(), Reader(stream).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise RefusedError("damaged: no list of storages follows the table of tensors")
    view, at, raw = memoryview(data), stream.tell(), {}
    for key in keys:
        if key not in reader.keys or key in raw or at + 8 > len(data):
            raise RefusedError(f"damaged or truncated at storage {key[:40]!r}")
        (count,) = struct.unpack_from("<q", data, at)
        size = count * _item_size(reader.keys[key])
        if count < 0 or at + 8 + size > len(data):
            raise RefusedError(f"truncated: storage {key[:40]!r} should have {count:,} numbers")
        raw[key] = view[at + 8 : at + 8 + size]
        at += 8 + size
    return top, raw


# --- from records to arrays ---


def _state_dict(top: Any) -> dict[str, Tensor]:
    for nested in ("state_dict", "model"):
        if isinstance(top, dict) and isinstance(top.get(nested), dict):
            top = top[nested]
            break
    if not isinstance(top, dict):
        raise RefusedError("holds no state dict (a dictionary from names to tensors)")
    for name, value in top.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise RefusedError(f"not a state dict: its entry {str(name)[:80]!r} is not a named tensor")
    return top


def _item_size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _materialise(tensors: dict[str, Tensor], raw: dict[str, memoryview]) -> dict[str, np.ndarray]:
    storages: dict[str, np.ndarray] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage.key not in raw:
            raise RefusedError(f"damaged or truncated: the numbers of {name[:80]!r} are not in it")
        if storage.key not in storages:
            storages[storage.key] = _numbers(raw[storage.key], storage.dtype)
        try:
            arrays[name] = _view(storages[storage.key], tensor)
        except RefusedError as error:
            raise RefusedError(f"damaged: {name[:80]!r} {error}") from None
    return arrays


def _numbers(raw: memoryview, dtype: str) -> np.ndarray:
    usable = raw[: len(raw) // _item_size(dtype) * _item_size(dtype)]
    if dtype == "bool":
        return np.frombuffer(usable, "u1") != 0
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(usable, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(usable, dtype)


def _view(numbers: np.ndarray, tensor: Tensor) -> np.ndarray:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if min((storage.total, storage.start, storage.count, tensor.offset, *shape, *strides), default=0) < 0:
        raise RefusedError("has a negative size, stride or offset")
    if len(shape) != len(strides):
        raise RefusedError("has sizes and strides that disagree")
    if storage.total > numbers.size or storage.start + storage.count > storage.total:
        raise RefusedError(f"needs a storage of {storage.total:,} numbers, and {numbers.size:,} are there")
    size = math.prod(shape)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if size else 0
    # Overlapping strides could make a view far larger than the file, to be allocated by whoever copies it.
    if last >= max(storage.count, 1) or size > storage.count:
        raise RefusedError(f"of shape {shape} reaches beyond its storage of {storage.count:,} numbers")
    if size == 0:
        raise RefusedError("is empty")
    window = numbers[storage.start + tensor.offset : storage.start + storage.count]
    byte_strides = [stride * numbers.itemsize if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)]
    return np.lib.stride_tricks.as_strided(window, shape, byte_strides, writeable=False)
