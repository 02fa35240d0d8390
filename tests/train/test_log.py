"""metrics.jsonl and the TensorBoard events: whole lines, and none twice after a resumption."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxcats.train.run_folder import RunLog


def scalars(folder) -> list[tuple[str, int, float]]:
    """(name, step, value) of all event files in order: TFRecords of length, its CRC, an Event, its CRC."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            at += 12 + size + 4
        assert at == len(data)
    return found


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder, rows, **options) -> None:
    log = RunLog(folder, **options)
    log.write(rows)
    log.close()


ROWS = [{"step": i, "loss": i / 4, "lr": 0.01} for i in range(1, 7)]


def test_rows_come_out_as_they_went_in(tmp_path):
    epoch = {"step": 6, "phase": "head", "errors": 3, "interval": [0.5, 0.9], "valid_loss": 0.1 + 0.2}
    written(tmp_path, [*ROWS, epoch])
    assert rows_of(tmp_path) == [*ROWS, epoch]


def test_rows_are_on_disk_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path)
    log.write(ROWS[:2])
    assert rows_of(tmp_path) == ROWS[:2]
    log.close()


def test_tensorboard_gets_the_numbers_at_their_steps(tmp_path):
    written(tmp_path, [*ROWS[:2], {"step": 2, "phase": "head", "valid_loss": 0.75, "interval": [0.5, 1.0]}])
    assert scalars(tmp_path) == [
        ("loss", 1, 0.25),
        ("lr", 1, pytest.approx(0.01)),
        ("loss", 2, 0.5),
        ("lr", 2, pytest.approx(0.01)),
        ("valid_loss", 2, 0.75),
        ("interval/0", 2, 0.5),
        ("interval/1", 2, 1.0),
    ]


def test_tensorboard_gets_each_groups_learning_rate(tmp_path):
    written(tmp_path, [{"step": 1, "loss": 0.5, "lr": [0.25, 0.5, 1.0]}])
    assert sorted(value for name, _, value in scalars(tmp_path) if name.startswith("lr")) == [0.25, 0.5, 1.0]


def test_a_new_log_starts_empty(tmp_path):
    written(tmp_path, ROWS)
    written(tmp_path, ROWS[:1])
    assert rows_of(tmp_path) == ROWS[:1]


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', '{"step": 3', "\0\0\0"])
def test_resuming_drops_later_rows_and_a_line_cut_short(tail, tmp_path):
    written(tmp_path, ROWS)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(tail)
    again = [{"step": i, "loss": 9.0} for i in (5, 6)]
    written(tmp_path, again, resume_step=4)
    assert rows_of(tmp_path) == ROWS[:4] + again


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "phase": "h\xffad"}',
        b"\xff\xfe\x00",
        b'{"step": 2\r, "loss"',
        b"[" * 100_000,
        b'{"step": ' + b"1" * 5000 + b"}",
        b"[1]",
        b'{"step": "2"}',
    ],
)
def test_a_damaged_line_costs_that_line_alone(line, tmp_path):
    written(tmp_path, ROWS)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    written(tmp_path, [], resume_step=4)
    assert rows_of(tmp_path) == [ROWS[0], *ROWS[2:4]]


def test_resuming_where_there_is_no_log_starts_one(tmp_path):
    written(tmp_path, ROWS[4:], resume_step=4)
    assert rows_of(tmp_path) == ROWS[4:]
