"""Reading .pth files without torch: right values from both layouts, a UserError for everything else."""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from jaxcats.common.errors import UserError
from jaxcats.models import torch_file
from jaxcats.models.torch_file import load_torch_file

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["tensors_zip", "tensors_legacy", "tensors_nested"])
def test_reads_every_kind_of_tensor(name):
    found = load_torch_file(GOLDEN / f"{name}.pth")
    with np.load(GOLDEN / "tensors.npz") as want:
        assert list(found) == want.files
        for key in want.files:
            assert found[key].dtype == want[key].dtype, key
            np.testing.assert_array_equal(found[key], want[key], err_msg=key)


# --- hand-made files: a minimal pickle in either container ---


def zipped(table: bytes, *, storage: bytes = b"", extra: dict[str, bytes] | None = None, compress=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, data in {"data.pkl": table, "data/0": storage, **(extra or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def legacy(table: bytes, *, keys=("0",), storage: bytes = struct.pack("<q", 0), little=True):
    head = [torch_file.LEGACY_PROTOCOL, {"little_endian": little}]
    parts = b"".join(pickle.dumps(part, 2) for part in head)
    return torch_file.LEGACY_MAGIC + parts + table + pickle.dumps(list(keys), 2) + storage


def tensor_table(shape, strides, *, offset=0, count=4, kind="FloatStorage", view=False) -> bytes:
    """The pickle of {"a": a tensor}, written opcode by opcode."""

    def number(value):
        return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    part = (b"(" + text("v") + number(0) + number(count) + b"t" if view else b"N") if view is not None else b""
    reference = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text("0") + text("cpu") + number(count)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + part + b"tQ" + number(offset)
    tensor += numbers(shape) + numbers(strides) + b"\x89}tR"
    return b"\x80\x02}" + text("a") + tensor + b"s."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


FLOATS = np.arange(4, dtype="<f4")


def refused(tmp_path, data: bytes) -> str:
    path = tmp_path / "bad.pth"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_torch_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("view", [None, False, True])
def test_the_hand_made_file_is_readable(tmp_path, view):
    table = tensor_table((2, 2), (1, 2), view=view)
    pickletools.dis(table, io.StringIO())
    for data in (zipped(table, storage=FLOATS.tobytes()), legacy(table, storage=b"\4" + bytes(7) + FLOATS.tobytes())):
        path = tmp_path / "good.pth"
        path.write_bytes(data)
        np.testing.assert_array_equal(load_torch_file(path)["a"], [[0, 2], [1, 3]])


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("wrap", [zipped, legacy])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_not_run(tmp_path, wrap, protocol):
    canary = tmp_path / "canary"
    attack = pickle.dumps({"a": Call(os.system, f"touch {canary}")}, protocol)
    message = refused(tmp_path, wrap(attack))
    assert not canary.exists()
    if protocol:
        assert "it asks for posix.system" in message
    assert "it will not be run" in message


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (Call(getattr, OrderedDict, "fromkeys"), "builtins.getattr"),
        (Call(eval, "1"), "builtins.eval"),
        (np.float64(1), "numpy"),
        (Path("x"), "pathlib"),
        (OrderedDict.fromkeys, "it"),
        (b"bytes", "it"),
        ({1, 2}, "EMPTY_SET"),
    ],
)
def test_anything_but_a_table_of_tensors_is_refused(tmp_path, value, word):
    assert word in refused(tmp_path, zipped(pickle.dumps({"a": value}, 4)))


def test_a_whole_module_is_refused():
    with pytest.raises(UserError, match=r"it asks for torch\.nn\.modules"):
        load_torch_file(GOLDEN / "module.pth")


@pytest.mark.parametrize(
    ("shape", "strides", "more"),
    [
        ((5,), (1,), {}),
        ((2, 2), (3, 1), {}),
        ((2,), (1,), {"offset": 3}),
        ((2,), (1,), {"offset": -1}),
        ((2,), (-1,), {"offset": 3}),
        ((-1,), (1,), {}),
        ((10**15,), (0,), {}),
        ((2**62, 2**62), (0, 0), {}),
        ((10**30,), (1,), {"count": 10**30}),
        ((5,), (1,), {"count": 5}),
        ((2,), (1, 1), {}),
        ((1,) * 40, (1,) * 40, {}),
        ((0,), (1,), {}),
        ((2.0,), (1,), {}),
        ((True,), (1,), {}),
        ((2,), (1,), {"kind": "ComplexFloatStorage"}),
        ((2,), (1,), {"kind": "Size"}),
    ],
)
def test_shapes_beyond_their_storage_are_refused(tmp_path, shape, strides, more):
    table = tensor_table(shape, strides, **more)
    refused(tmp_path, zipped(table, storage=FLOATS.tobytes()))
    refused(tmp_path, legacy(table, storage=struct.pack("<q", 4) + FLOATS.tobytes()))


@pytest.mark.parametrize("name", ["tensors_zip", "tensors_legacy"])
def test_truncated_anywhere_is_refused(tmp_path, name):
    data = (GOLDEN / f"{name}.pth").read_bytes()
    for end in range(0, len(data), 37):
        refused(tmp_path, data[:end])


@pytest.mark.parametrize("name", ["tensors_zip", "tensors_legacy", "tensors_nested"])
def test_damaged_bytes_never_crash(tmp_path, name):
    """Every single-byte change either is refused or gives arrays no larger than the file."""
    data = (GOLDEN / f"{name}.pth").read_bytes()
    path, rng, outcomes = tmp_path / "damaged.pth", np.random.default_rng(0), set()
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([rng.integers(256)]) + data[position + 1 :])
        try:
            found = load_torch_file(path)
            assert all(array.nbytes <= 2 * len(data) for array in found.values())
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "not a file by torch.save"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYP'"),
        (b"PK\x03\x04 nothing", "damaged or truncated (File is not a zip file)"),
        (zipped(b"\x80\x02]."), "no state dict"),
        (zipped(b"\x80\x02}" + text("epoch") + b"K\x03s."), "'epoch' is not a named tensor"),
        (zipped(b"\x80\x02}K\x03K\x03s."), "'3' is not a named tensor"),
        (zipped(b"\x80\x02R."), "damaged or truncated"),
        (zipped(b"\x80\x02(."), "damaged or truncated"),
        (zipped(b"\x80\x02}(K\x01)r."), "damaged or truncated"),
        (zipped(b"\x80\x02" + b"K\x01\x85" * 9 + b"}\x94" + b"h\x07."), "damaged or truncated"),
        (zipped(b"\x80\x02}X\xff\xff\xff\xff."), "damaged or truncated"),
        (zipped(tensor_table((1,), (1,)), extra={"byteorder": b"big"}), "big-endian"),
        (zipped(tensor_table((1,), (1,)), storage=bytes(99), compress=zipfile.ZIP_DEFLATED), "compressed"),
        (zipped(tensor_table((1,), (1,)), extra={"x/data.pkl": b""}), "one data.pkl"),
        (legacy(tensor_table((1,), (1,)), little=False), "big-endian"),
        (legacy(tensor_table((1,), (1,)), keys=[]), "'a' of shape (1,) does not fit into its storage of 0 numbers"),
        (legacy(tensor_table((1,), (1,)), keys=[1]), "damaged or truncated (1)"),
        (legacy(tensor_table((1,), (1,)), keys=["0", "0"], storage=bytes(16)), "damaged or truncated: storage '0'"),
        (legacy(tensor_table((1,), (1,)), storage=struct.pack("<q", 2**61)), "truncated: storage '0'"),
        (legacy(tensor_table((1,), (1,)), storage=struct.pack("<q", -1)), "truncated: storage '0'"),
    ],
)
def test_each_damage_has_its_message(tmp_path, data, word):
    assert word in refused(tmp_path, data)


def test_what_is_said_of_a_damaged_file_is_short(tmp_path):
    """Here the length of the first name covers the whole file, which the zip reader then quotes; found by fuzzing."""
    data = (GOLDEN / "tensors_zip.pth").read_bytes()
    quoted = data[:6] + b"\0\0" + data[8:26] + struct.pack("<H", 4000) + data[28:]
    for bad in (quoted, zipped(tensor_table((1,) * 2000, (1,) * 2000))):
        assert len(refused(tmp_path, bad)) < 500


def test_a_table_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_TABLE", 1000)
    table = b"\x80\x02" + b"N" * 2000 + b"."
    assert "of at most 1,000 bytes" in refused(tmp_path, zipped(table))
    assert "damaged or truncated" in refused(tmp_path, legacy(table))


DOUBLED = b"K\x01\x85\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
NAMED = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    ("table", "word"),
    [
        (b"N\x94r\xff\xff\xff\x7f}.", "nothing"),  # a memo of 2**31 places: read, since ours is a dictionary
        (b"}" + DOUBLED + b"K\x01s.", "neither text nor numbers"),  # a key whose hash takes 2**60 steps
        (b"}" + b")" + b"\x85" * 500_000 + b"K\x01s.", "neither text nor numbers"),  # and one too deep to be hashed
        (
            b"}" + b"".join(b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"N" for i in range(9)) + b"s.",
            "keys",
        ),
        (b"}G" + bytes(8) + b"Ns.", "neither text nor numbers"),
        (b"]" * 500_000 + b"a" * 499_999 + b".", "no state dict"),  # deep, but nothing descends into it
        (b"}\x94" + text("model") + b"h\x00s.", "'model' is not a named tensor"),  # a cycle
        (b"\x82\x01.", "uses EXT1"),
        (b"\x83\x01\x00.", "uses EXT2"),
        (NAMED + b")\x81.", "uses NEWOBJ"),
        (NAMED + b")}\x92.", "uses NEWOBJ_EX"),
        (b"(iposix\nsystem\n.", "uses INST"),
        (b"(" + NAMED + b"o.", "uses OBJ"),
        (b"}2.", "uses DUP"),
        (b"\x8f\x91.", "uses EMPTY_SET"),
        (b"\x96" + bytes(8) + b".", "uses BYTEARRAY8"),
        (b"\x8b\xff\xff\xff\x7f.", "uses LONG4"),
        (b"\xfe.", "damaged or truncated"),
        (text("a\nb") + text("c\nd") + b"\x93.", "it asks for a b.c d, which is no part of a tensor"),
        (NAMED + b"}" + text("name") + text("x") + b"sb.", "sets attributes of something"),
        (NAMED + b"]\x85R.", "calls collections.OrderedDict in an unknown way"),
        (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage in an unknown way"),
        (b"ctorch._utils\n_rebuild_parameter\n}\x85R.", "calls torch._utils._rebuild_parameter in an unknown way"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "_rebuild_tensor_v2 in an unknown way"),
        (b"ctorch\nSize\n" + b"]\x85R.", "sizes that are not whole numbers"),
        (b"N)R.", "damaged or truncated"),
        (text("x") + b"Q.", "damaged or truncated"),
        (b"}Q.", "damaged or truncated"),
        (b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x01tQ.", "damaged or truncated"),
        (b"\x95" + b"\xff" * 8 + b"}.", "damaged or truncated"),
        (b"X\xff\xff\xff\x7fabc.", "damaged or truncated"),
    ],
)
def test_a_hostile_table_is_refused_at_once(tmp_path, table, word):
    """What a pickle can do without calling anything: fill the memory, take for ever, overflow the stack, change a class."""
    if word == "nothing":
        path = tmp_path / "harmless.pth"
        path.write_bytes(zipped(b"\x80\x02" + table))
        assert load_torch_file(path) == {}
    else:
        assert word in refused(tmp_path, zipped(b"\x80\x02" + table))


def test_one_storage_of_two_kinds_is_refused(tmp_path):
    def entry(name: str, kind: str) -> bytes:
        return tensor_table((1,), (1,), kind=kind)[3:-1].replace(text("a"), text(name))

    table = b"\x80\x02}" + entry("a", "FloatStorage") + entry("b", "HalfStorage") + b"."
    assert "no storage" in refused(tmp_path, zipped(table, storage=bytes(16)))
