"""Reads .pth files, which hold pickles, without running anything that they name.

A pickle is a program that may call any function by its name. `TableUnpickler` is the standard library's unpickler with
three restrictions: it knows only the opcodes that a table of tensors needs, it admits only the few names in `GLOBALS`,
and each name stands for a record of this module instead of the object that has the name.
`pretrained.read_tensors` uses this module.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcats.common.errors import UserError

MAX_TABLE = 8_000_000  # bytes of pickle, each of which can make an object of 80 bytes; a ResNet50 has 60,000
DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("bool"),
}
GLOBALS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in DTYPES),
}
OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    SHORT_BINSTRING EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS
    GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
"""
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
LEGACY_PROTOCOL = 1001


class RefusedError(Exception):
    """The file holds something that a table of tensors does not; becomes a UserError that names the file."""


def load_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Read the tensors of a state dict that torch.save wrote.

    Args:
        path: a file in torch's zip format or in the format before it. The state dict may be the file's top object, or
            its entry "state_dict" or "model".

    Returns:
        The tensors by name, as read-only arrays that may share memory; bfloat16 becomes float32.

    Raises:
        UserError: names the file and the reason: it is truncated, it holds other objects than tensors, or sparse or
            quantised tensors, or it comes from a big-endian machine.
    """
    data = Path(path).read_bytes()
    try:
        top, storages = _read_zip(data) if data[:4] == b"PK\x03\x04" else _read_legacy(data)
        return {name: _to_array(name, tensor, storages) for name, tensor in _state_dict(top).items()}
    except MemoryError:
        raise UserError(f"{path}: does not fit in memory") from None
    except Exception as error:  # zipfile and the unpickler raise many kinds for a damaged file
        reason = str(error) if isinstance(error, RefusedError) else f"damaged or truncated ({error})"
        reason = " ".join(reason[:300].split())  # it may quote a name from the file, of any length, with line breaks
        raise UserError(f"{path}: {reason}") from None


# --- the table of tensors: a pickle becomes plain containers and the records below ---


class Storage(NamedTuple):
    """A run of numbers: `count` of them from `start` in the storage `key`."""

    key: str
    start: int
    count: int


class Tensor(NamedTuple):
    """A strided view of a storage, not yet read; offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Global(NamedTuple):
    """A name that the file mentions; calling it makes a record. (As a tuple it has no attributes that BUILD could set.)"""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        match self.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                return {}
            case "Size", (sizes,):
                return _integers(sizes)
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (Storage() as storage, offset, shape, strides, *_):
                (offset,) = _integers((offset,))
                return Tensor(storage, offset, _integers(shape), _integers(strides))
            case "_rebuild_parameter", (Tensor() as tensor, *_):
                return tensor
        raise RefusedError(f"it calls {self.name} in an unknown way")


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > 16 or not all(type(value) is int for value in values):
        raise ValueError("sizes that are not whole numbers")
    return values


# The unpickler written in Python, not the one in C. That one makes its memo as long as an index in the file says (four
# bytes of file, 32 GB of memory), hashes any key (which for nested tuples can take for ever or overflow the stack),
# and knows all opcodes.
_PythonUnpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]
_CODES = {op.name: ord(op.code) for op in pickletools.opcodes}


class TableUnpickler(_PythonUnpickler):
    """Reads one pickle from a stream; `dtypes` has the storages that it mentions, by key."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin-1")
        self.dtypes: dict[str, np.dtype] = {}

    def find_class(self, module: str, name: str) -> Global:
        if (full_name := f"{module}.{name}") not in GLOBALS:
            raise RefusedError(f"it asks for {full_name[:80]}, which is no part of a tensor; it will not be run")
        return Global(full_name)

    def persistent_load(self, pid: Any) -> Storage:
        """A storage: ("storage", class, key, device, count) and, in old files, a view (key, start, count) of it."""
        word, kind, key, _, count, *view = pid
        dtype = DTYPES[kind.name.removeprefix("torch.")]
        if word != "storage" or not isinstance(key, str) or self.dtypes.setdefault(key, dtype) != dtype:
            raise ValueError("a reference to no storage")
        start, count = _integers(view[0][1:] if view and view[0] is not None else (0, count))
        return Storage(key, start, count)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        # Only for text and for numbers of 64 bits can nobody choose keys that take long to hash, or that all collide.
        plain = all(isinstance(key, str) or (type(key) is int and abs(key) < 2**63) for key in items[::2])
        if not isinstance(self.stack[-1], dict) or not plain:
            raise ValueError("items of no dictionary, or keys that are neither text nor numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_build(self) -> None:
        self.stack.pop()  # attributes, such as the _metadata of a state dict, say nothing about tensors
        if not isinstance(self.stack[-1], dict):
            raise RefusedError("it sets attributes of something that is not a dictionary")

    def refuse(self, opcode: str) -> None:
        raise RefusedError(f"its pickle uses {opcode}, which no table of tensors needs; it will not be run")

    dispatch: ClassVar = {code: lambda self, name=name: self.refuse(name) for name, code in _CODES.items()}
    dispatch |= {_CODES[name]: _PythonUnpickler.dispatch[_CODES[name]] for name in OPCODES.split()}
    dispatch |= {_CODES["SETITEM"]: load_setitem, _CODES["SETITEMS"]: load_setitems, _CODES["BUILD"]: load_build}


# --- the two formats: each gives the top object and the numbers of each storage ---


def _read_zip(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = archive.infolist()
    # torch.save never compresses, so the contents can't be larger than the file.
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > len(data):
        raise RefusedError("its contents are compressed or overlap; torch.save does not write that")
    tables = [e for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
    if len(tables) != 1 or tables[0].file_size > MAX_TABLE:
        raise RefusedError(f"not by torch.save: it should hold one data.pkl, of at most {MAX_TABLE:,} bytes")
    folder = tables[0].filename.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise RefusedError("written on a big-endian machine, which is not supported")
    unpickler = TableUnpickler(io.BytesIO(archive.read(tables[0])))
    top = unpickler.load()
    return top, {key: _numbers(archive.read(f"{folder}data/{key}"), dt) for key, dt in unpickler.dtypes.items()}


def _read_legacy(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """Five pickles (magic number, protocol, system, table, keys of the storages), then each storage behind its count."""
    if not data.startswith(LEGACY_MAGIC):
        raise RefusedError(f"not a file by torch.save (it begins with {data[:8]!r})")
    stream = io.BytesIO(data[:MAX_TABLE])
    stream.seek(len(LEGACY_MAGIC))
    protocol, system = TableUnpickler(stream).load(), TableUnpickler(stream).load()
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("of an unknown version, or written on a big-endian machine, which is not supported")
    unpickler = TableUnpickler(stream)
    top, keys = unpickler.load(), TableUnpickler(stream).load()
    at, storages = stream.tell(), {}
    for key in keys:
        (count,) = struct.unpack_from("<q", data, at)
        end = at + 8 + count * unpickler.dtypes[key].itemsize
        if count < 0 or end > len(data) or key in storages:
            raise RefusedError(f"damaged or truncated: storage {key[:40]!r} should have {count:,} numbers")
        storages[key] = _numbers(memoryview(data)[at + 8 : end], unpickler.dtypes[key])
        at = end
    return top, storages


def _numbers(raw: bytes | memoryview, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        return np.frombuffer(raw, "u1") != 0
    numbers = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    return numbers.astype(np.float32) if dtype == jnp.bfloat16 else numbers


# --- from records to arrays ---


def _state_dict(top: Any) -> dict[str, Tensor]:
    if not isinstance(top, dict):
        raise RefusedError("holds no state dict (a dictionary from names to tensors)")
    top = next((top[name] for name in ("state_dict", "model") if isinstance(top.get(name), dict)), top)
    for name, value in top.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise RefusedError(f"not a state dict: its entry {str(name)[:80]!r} is not a named tensor")
    return top


def _to_array(name: str, tensor: Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    (key, start, count), offset, shape, strides = tensor
    numbers, size = storages.get(key, np.empty(0)), math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    fits = min(start, offset, *shape, *strides) >= 0 and start + count <= numbers.size and last < count
    # Overlapping strides could make a view far larger than the file, which whoever copies it would have to allocate.
    if not fits or not 0 < size <= count:
        storage = f"its storage of {min(count, numbers.size):,} numbers"
        raise RefusedError(f"damaged: {name[:80]!r} of shape {shape} does not fit into {storage}")
    byte_strides = [stride * numbers.itemsize if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)]
    window = numbers[start + offset : start + count]
    return np.lib.stride_tricks.as_strided(window, shape, byte_strides, writeable=False)
