"""The feature cache: what is computed again and what isn't, and what damage costs."""

import hashlib
import itertools

import jax
import numpy as np
import pytest
from safetensors.numpy import save

from jaxcats.core.state import tree_hash
from jaxcats.train import features
from jaxcats.train.features import cached_features

FACTS = {"backbone": "tiny", "weights": "ab" * 32, "dtype": "float32", "preprocess": {"size": 224, "policy": "lesson"}}
WIDTH = 5


def hashes(*names: str) -> list[str]:
    return [hashlib.sha256(name.encode()).hexdigest() for name in names]


def value(h: str) -> np.ndarray:
    """What the backbone makes of an image, here: a function of its content alone."""
    return np.frombuffer(bytes.fromhex(h), np.uint8)[:WIDTH].astype(np.float32) / 7


@pytest.fixture
def get(tmp_path):
    """get(hashes, ...): cached features, checked against `value`; `get.asked` has the rows of every computation."""

    def run(names, *, facts=FACTS, batch=2, cache_dir=None, dies_after=None):
        def compute(rows):
            run.asked.append(rows.tolist())
            for at in range(0, len(rows), batch):
                if dies_after is not None and at >= dies_after:
                    raise KeyboardInterrupt
                part = rows[at : at + batch]
                yield part, np.stack([value(names[r]) for r in part])

        got = cached_features(names, facts=facts, width=WIDTH, compute=compute, cache_dir=cache_dir or tmp_path)
        assert got.features.dtype == np.float32
        np.testing.assert_array_equal(got.features, np.array([value(h) for h in names]).reshape(-1, WIDTH))
        return got

    run.asked = []
    return run


def shards(cache_dir):
    return sorted(cache_dir.glob("features/*/*.safetensors"))


def test_the_second_time_nothing_is_computed(get):
    names = hashes("a", "b", "c")
    first = get(names)
    assert (first.reused, first.computed) == (0, 3)
    second = get(names)
    assert (second.reused, second.computed) == (3, 0)
    assert get.asked == [[0, 1, 2]]


def test_only_changed_images_are_computed_again(get):
    get(hashes("a", "b", "c", "d"))
    got = get(hashes("a", "B", "c", "d", "e"))
    assert get.asked[1:] == [[1, 4]]
    assert (got.reused, got.computed) == (3, 2)


def test_the_order_and_the_selection_do_not_matter(get):
    get(hashes("a", "b", "c", "d"))
    get(hashes("d", "b"))
    get(hashes("c", "a", "d", "b"))
    assert len(get.asked) == 1


def test_equal_images_are_computed_once_and_not_called_reused(get):
    got = get(hashes("a", "b", "a", "a"))
    assert get.asked == [[0, 1]]
    assert (got.reused, got.computed) == (0, 2)
    again = get(hashes("a", "b", "a", "a"))
    assert (again.reused, again.computed) == (4, 0)


def test_no_images_need_no_computation(get):
    assert get([]).features.shape == (0, WIDTH)
    assert get.asked == []


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def garbage(path):
    path.write_bytes(b"not a shard")


def empty(path):
    path.write_bytes(b"")


def forged(**tensors):
    """Damage: these tensors, under the name that they should have."""

    def damage(path):
        data = save(tensors)
        path.unlink()
        path.with_name(f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)

    return damage


FORGED = [
    forged(a=np.zeros(3)),
    forged(hashes=np.zeros((3, 32), np.uint8), features=np.zeros((3, WIDTH), np.int32)),
    forged(hashes=np.zeros((3, 32), np.float32), features=np.zeros((3, WIDTH), np.float32)),
    forged(hashes=np.zeros((), np.uint8), features=np.zeros((), np.float32)),
    forged(hashes=np.zeros((3, 32, 1), np.uint8), features=np.zeros((3, WIDTH), np.float32)),
    forged(hashes=np.zeros((3, 32), np.uint8), features=np.zeros((3, WIDTH + 1), np.float32)),
]


@pytest.mark.parametrize("damage", [flip, cut, garbage, empty, *FORGED])
def test_a_damaged_shard_is_named_and_computed_again(damage, get, tmp_path, capsys):
    names = hashes("a", "b", "c")
    get(names)
    damage(shards(tmp_path)[0])
    broken = shards(tmp_path)[0]
    got = get(names)
    assert (got.reused, got.computed) == (0, 3)
    assert capsys.readouterr().err == f"warning: {broken}: damaged; removed and computed again.\n"
    assert get(names).reused == 3
    assert len(get.asked) == 2


def test_shards_that_cannot_be_read_are_passed_over_and_stay(get, tmp_path, capsys):
    """Without permission, or from a disk that fails for a moment: they may be whole."""
    names = hashes("a", "b")
    get(names[:1])
    get(names)
    paths = shards(tmp_path)
    for path in paths:
        path.rename(path.with_suffix(".kept"))
        path.mkdir()  # what no permission is to others: reading it fails, for root as well
    got = get(names)
    assert (got.reused, got.computed) == (0, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{paths[0]}: can't be read (Is a directory); the features in 2 such files" in said
    for path in paths:
        path.rmdir()
        path.with_suffix(".kept").rename(path)
    assert get(names).reused == 2


def test_too_little_memory_to_read_a_shard_removes_nothing(get, tmp_path, monkeypatch):
    get(hashes("a"))

    def fail(data):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(features, "load", fail)
        with pytest.raises(MemoryError):
            get(hashes("a"))
    assert get(hashes("a")).reused == 1


def test_damage_in_one_shard_costs_only_its_rows(get, tmp_path):
    get(hashes("a", "b"))
    old = shards(tmp_path)
    get(hashes("a", "b", "c"))
    flip(next(p for p in shards(tmp_path) if p not in old))
    assert get(hashes("a", "b", "c")).computed == 1
    assert get.asked[-1] == [2]


def test_a_cache_folder_that_cannot_be_written_is_said_and_survived(get, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        got = get(hashes("a", "b"), cache_dir=tmp_path / "file" / "cache")
        assert (got.reused, got.computed) == (0, 2)
        err = capsys.readouterr().err
        assert "can't be written" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"backbone": "resnet18"},
        {"weights": "cd" * 32},
        {"dtype": "bfloat16"},
        {"preprocess": {"size": 192, "policy": "lesson"}},
        {"preprocess": {"size": 224, "policy": "weights"}},
        {"transform": 2},
    ],
)
def test_every_fact_changes_the_key(other, get):
    get(hashes("a"))
    assert get(hashes("a"), facts=FACTS | other).computed == 1
    assert get(hashes("a"), facts=dict(reversed(FACTS.items()))).computed == 0  # the order of the facts is none


def test_asked_to_end_in_the_middle_all_that_is_computed_stays(get, monkeypatch):
    monkeypatch.setattr(features, "SHARD_ROWS", 4)
    names = hashes(*"abcdefghij")
    with pytest.raises(KeyboardInterrupt):
        get(names, dies_after=6)
    got = get(names)
    assert (got.reused, got.computed) == (6, 4)
    assert get.asked[1] == [6, 7, 8, 9]


def test_asked_to_end_while_it_saves_the_finished_shards_stay(get, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "SHARD_ROWS", 4)
    names, write, calls = hashes(*"abcdefghij"), features.write_bytes, itertools.count()

    def interrupted(path, data):
        if next(calls) == 1:  # once: the `finally` saves what was not
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get(names)
    assert get(names).reused == 8
    assert [p.name for p in tmp_path.rglob("*") if p.name.endswith("tmp")] == []


def test_killed_in_the_middle_the_finished_shards_stay(get, monkeypatch):
    """Nothing is written at the end of a killed process."""
    monkeypatch.setattr(features, "SHARD_ROWS", 4)
    names, write, calls = hashes(*"abcdefghij"), features._write_shard, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(features, "_write_shard", lambda *args: next(calls) == 0 and write(*args))
        with pytest.raises(KeyboardInterrupt):
            get(names, dies_after=6)
    got = get(names)
    assert (got.reused, got.computed) == (4, 6)


def test_every_process_that_computes_the_same_rows_leaves_the_same_files(get, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "SHARD_ROWS", 4)
    for name in "ab":
        get(hashes(*"abcdefghij"), cache_dir=tmp_path / name)
    left = [[path.name for path in shards(tmp_path / name)] for name in "ab"]
    assert left[0] == left[1]
    assert len(left[0]) == 3


def test_a_half_written_shard_is_not_read(get, tmp_path, capsys):
    names = hashes("a", "b")
    get(names)
    shard = shards(tmp_path)[0]
    (shard.parent / "leftover.tmp").write_bytes(shard.read_bytes()[:50])
    assert get(names).reused == 2
    assert capsys.readouterr().err == ""


def test_the_same_values_come_back_bit_for_bit(tmp_path):
    odd = np.array([[np.float32(1e-45), -0.0, np.inf, 3.4e38, 0.1]], np.float32)
    options = {"facts": FACTS, "width": WIDTH, "cache_dir": tmp_path}
    cached_features(hashes("a"), compute=lambda rows: iter([(rows, odd)]), **options)
    again = cached_features(hashes("a"), compute=lambda rows: pytest.fail("computed again"), **options)
    assert again.features.tobytes() == odd.tobytes()


def test_the_hash_of_weights_sees_names_shapes_types_and_bytes():
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.zeros(2)}
    assert tree_hash(tree) == tree_hash({"c": np.zeros(2), "a": {"b": np.arange(6, dtype=np.float32)}})
    others = [
        {"a": {"d": np.arange(6, dtype=np.float32)}, "c": np.zeros(2)},
        {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.zeros(2)},
        {"a": {"b": np.arange(6, dtype=np.int32)}, "c": np.zeros(2)},
        {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.array([0.0, -0.0])},
    ]
    assert len({tree_hash(t) for t in [tree, *others]}) == 5
    with pytest.raises(TypeError, match="references"):
        tree_hash({"a": object()})


def test_the_cpu_trains_on_features_where_they_lie(tmp_path):
    """Otherwise they are in memory twice, which for ten million images is 50 GB more."""
    names = hashes(*map(str, range(64)))

    def compute(rows):
        yield rows, np.ones((len(rows), 1280), np.float32)

    found = cached_features(names, facts=FACTS, width=1280, compute=compute, cache_dir=tmp_path).features
    for part in (found, found[40:]):
        placed = jax.device_put(part, jax.devices("cpu")[0])
        assert placed.unsafe_buffer_pointer() == part.ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0
