"""Reads the tensors of a .pth file with NumPy alone: no torch, and no pickle machine that could run what a file says.

A .pth file is a pickle, which torch_pickle.py turns into a table of records, plus raw storages. Both layouts are
read: the zip that torch.save writes since 1.6, and the older stream of five pickles.
"""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxcats.errors import UserError
from jaxcats.models.torch_pickle import Reader, RefusedError, Tensor

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
