"""Checkpoints: the same bits back, complete or absent, and only those worth keeping."""

import os
import random
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcats.common.errors import RunError, UserError
from jaxcats.core import state as state_module
from jaxcats.train.checkpoint import Checkpoints, selection_metric


def state_of(seed: int) -> state_module.TrainState:
    """A small state of every kind of leaf, with bits that a detour through text or another type would lose."""
    rng = np.random.default_rng(seed)
    odd = np.array([1e-45, -0.0, np.inf, 3.4e38], np.float32)
    params = {"backbone": {"conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32)}}, "head": {"bias": odd}}
    stats = {"backbone": {"bn": {"mean": rng.normal(size=4).astype(np.float32)}}, "head": {}}
    trainable = {"backbone": {"conv": {"kernel": False}}, "head": {"bias": True}}
    params, stats = jax.tree.map(jnp.asarray, (params, stats))
    return state_module.create(params, stats, optax.adam(1e-3), trainable=trainable, step=seed)


def meta_of(step: int) -> dict:
    return {
        "step": step,
        "phase": "head",
        "progress": {"epoch": 1, "best": None, "smooth": 0.1 + 0.2},
        "classes": ["é", "b"],
    }


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture
def store(tmp_path):
    """A store that is closed at the end, and `store.again()`, the same folder as another process would open it."""
    opened = []

    def again(**options):
        opened.append(Checkpoints(tmp_path / "checkpoints", **options))
        return opened[-1]

    first = again()
    first.again = again
    yield first
    for checkpoints in opened:
        checkpoints.close()


def judged(errors: float, loss: float = 0.5) -> dict[str, float]:
    return {"errors": errors, "loss": loss}


def test_the_same_bits_and_facts_come_back(store):
    state = state_of(7)
    store.save(state, meta_of(7), metrics=judged(3))
    store.close()
    opened = store.again(read_only=True)
    assert opened.steps() == [7]
    assert opened.meta(7) == meta_of(7)
    back = opened.restore(7, jax.eval_shape(lambda: state_of(0)))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert bits(back) == bits(state)
    assert [x.dtype for x in jax.tree.leaves(back)] == [x.dtype for x in jax.tree.leaves(state)]


def test_the_state_may_be_donated_as_soon_as_save_returns(store):
    state = state_of(1)
    kept = bits(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    store.save(state, meta_of(1))
    assert (np.asarray(overwrite(state).params["head"]["bias"])[1:2] == -1).all()
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    store.close()
    assert bits(store.again(read_only=True).restore(1, jax.eval_shape(lambda: state_of(0)))) == kept


def test_the_latest_and_the_best_are_kept_and_no_others(store):
    folder = store.folder
    for step, errors, expected in [
        (1, 9, [1]),
        (2, 4, [2]),
        (3, 6, [2, 3]),
        (4, 5, [2, 4]),
        (5, 1, [5]),
        (6, 8, [5, 6]),
    ]:
        store.save(state_of(step), meta_of(step), metrics=judged(errors))
        store._manager.wait_until_finished()
        assert store.steps() == expected
        assert sorted(int(p.name) for p in folder.iterdir()) == expected
    assert (store.pick("last"), store.pick("best"), store.pick("5")) == (6, 5, 5)
    opened = store.again(read_only=True)
    assert (opened.pick("last"), opened.pick("best")) == (6, 5)


def test_of_equal_errors_the_lower_loss_is_best(store):
    for step, errors, loss in [(1, 2, 0.1), (2, 1, 90.0), (3, 1, 0.8), (4, 1, 0.9)]:
        store.save(state_of(step), meta_of(step), metrics=judged(errors, loss))
    store._manager.wait_until_finished()
    assert store.pick("best") == 3
    assert store.steps() == [3, 4]


def test_the_best_of_a_tie_is_there_to_be_read(store):
    for step in (1, 2, 3):
        store.save(state_of(step), meta_of(step), metrics=judged(2))
        store._manager.wait_until_finished()
    assert store.pick("best") in store.steps()
    assert store.meta(store.pick("best"))["phase"] == "head"


def test_a_checkpoint_in_the_middle_of_an_epoch_is_the_latest_and_never_the_best(store):
    store.save(state_of(1), meta_of(1), metrics=judged(5))
    for step in (2, 3):
        store.save(state_of(step), meta_of(step))
    store._manager.wait_until_finished()
    assert store.steps() == [1, 3]
    assert (store.pick("last"), store.pick("best")) == (3, 1)


def test_without_any_metrics_the_best_is_the_latest(store):
    for step in (1, 2):
        store.save(state_of(step), meta_of(step))
    store._manager.wait_until_finished()
    assert store.steps() == [2]
    assert store.pick("best") == 2


@pytest.mark.parametrize("which", ["7", "latest", "-1", "", "1.0", "²"])
def test_a_checkpoint_that_is_not_there_is_a_mistake(which, store):
    store.save(state_of(1), meta_of(1))
    store._manager.wait_until_finished()
    with pytest.raises(UserError, match="last, best or one of 1"):
        store.pick(which)


def test_no_checkpoint_at_all_is_a_mistake(store):
    with pytest.raises(UserError, match="no complete checkpoint"):
        store.pick("last")


def test_a_half_written_checkpoint_is_no_checkpoint_and_is_cleaned_away(store):
    """What a killed process leaves: Orbax writes into a folder of another name and renames it at the end."""
    store.save(state_of(1), meta_of(1), metrics=judged(5))
    store.close()
    half = store.folder / "2.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "part").write_bytes(b"\0" * 100)
    reader = store.again(read_only=True)
    assert (reader.steps(), reader.pick("last")) == ([1], 1)
    assert half.is_dir()  # a reader, beside a run that goes on, removes nothing
    writer = store.again()
    assert writer.steps() == [1]
    writer.save(state_of(2), meta_of(2), metrics=judged(4))
    writer.close()  # the cleaning is done in the background
    assert not half.exists()
    assert store.again(read_only=True).pick("last") == 2


def test_a_reader_creates_nothing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    reader = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert reader.steps() == []
    reader.close()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_another_networks_target_is_refused_by_name(store):
    store.save(state_of(1), meta_of(1))
    store._manager.wait_until_finished()
    other = state_of(1)
    other.params["head"]["kernel"] = jnp.zeros(3)
    with pytest.raises(UserError, match="another network"):
        store.restore(1, other)


def test_altered_arrays_are_noticed(store):
    """A byte that flips on a disk must not become another classifier with the old one's name."""
    state = state_of(1)
    store.save(state, meta_of(1))
    store.close()
    files = [p for p in (store.folder / "1" / "state").rglob("*") if p.is_file()]  # the store keeps copies
    kernel = np.asarray(state.params["backbone"]["conv"]["kernel"]).tobytes()[40:80]
    hit = [p for p in files if kernel in p.read_bytes()]
    if not hit:
        pytest.skip("these arrays were compressed, and altering them breaks the decompression")
    for path in hit:
        content = bytearray(path.read_bytes())
        content[content.index(kernel)] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match="can't be used"):
        store.again(read_only=True).restore(1, jax.eval_shape(lambda: state_of(0)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"epoch": 1', b'"epoch": 0'),
        (b'"smooth"', b'"smooti"'),
        (b"0.30000000000000004", b"0.30000000000000009"),
        (b'"sha256"', b'"sha257"'),
        (b'"facts"', b'"facte"'),
        (b'"arrays"', b'"arrayt"'),
    ],
)
def test_altered_facts_are_noticed(old, new, store):
    """One digit, and a run would go on from another place than it was saved at, without a word."""
    store.save(state_of(1), meta_of(1), metrics=judged(3))
    store.close()
    path = store.folder / "1" / "meta" / "metadata"
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    opened = store.again(read_only=True)
    with pytest.raises(UserError, match=r"1: this checkpoint can't be used \(its facts are not those"):
        opened.meta(1)
    with pytest.raises(UserError, match="can't be used"):
        opened.restore(1, jax.eval_shape(lambda: state_of(0)))


def test_altered_metrics_are_noticed_before_the_best_is_chosen_or_removed(store):
    for step, errors in [(1, 3), (2, 4)]:
        store.save(state_of(step), meta_of(step), metrics=judged(errors))
    store.close()
    path = store.folder / "1" / "metrics" / "metrics"
    path.write_bytes(path.read_bytes().replace(b"3", b"8"))
    reader = store.again(read_only=True)
    assert reader.pick("best") == 1  # the latest remembers which it was
    assert reader.meta(reader.pick("last")) == meta_of(2)
    with pytest.raises(UserError, match=r"1: this checkpoint can't be used \(its metrics are not those"):
        store.again()  # which would remove the best at the next save
    shutil.rmtree(store.folder / "1")  # what the message says
    assert store.again().pick("best") == 2


@pytest.mark.parametrize("gone", ["metrics", "meta", "state", "_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
def test_what_a_killed_process_was_removing_is_removed(store, gone):
    """Neither the latest nor the best, and half of it gone already."""
    store.save(state_of(2), meta_of(2), metrics=judged(5))
    store.wait()
    shutil.copytree(store.folder / "2", store.folder.parent / "aside")
    for step, errors in [(3, 1), (4, 2)]:
        store.save(state_of(step), meta_of(step), metrics=judged(errors))
    store.close()
    half = store.folder.parent / "aside" / gone
    shutil.rmtree(half) if half.is_dir() else half.unlink()
    shutil.copytree(store.folder.parent / "aside", store.folder / "2")
    reader = store.again(read_only=True)
    assert (reader.pick("last"), reader.pick("best")) == (4, 3)
    opened = store.again()
    assert opened.steps() == [3, 4]
    assert not (store.folder / "2").exists()
    opened.save(state_of(5), meta_of(5), metrics=judged(4))
    opened.wait()
    assert opened.steps() == [3, 5]


def test_the_facts_may_hold_what_json_changes(store):
    store.save(state_of(1), {"step": 1, "shape": (3, 4), 7: None, "é": float("nan")})
    store.close()
    found = store.again(read_only=True).meta(1)
    assert (found["shape"], found["7"], found["é"] != found["é"]) == ([3, 4], None, True)


def damaged(chance: random.Random, good: bytes) -> bytes:
    """One to four bytes altered, or the rest cut off, or all replaced by JSON of another kind."""
    data = bytearray(good)
    for _ in range(chance.choice([1, 1, 2, 4])):
        data[chance.randrange(len(data))] = chance.choice([*b"0123456789abc{}[],", chance.randrange(256)])
    if chance.random() < 0.1:
        return bytes(data[: chance.randrange(len(data))])
    if chance.random() < 0.1:
        return chance.choice([b"null", b"[]", b"{}", b"3", b'{"errors": "3"}', b'{"loss": 0.5}', b"[" * 100_000])
    return bytes(data)


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_damage_anywhere_is_one_line_or_changes_nothing(seconds, store, tmp_path):
    """Its arrays, facts and metrics, and what Orbax keeps beside them, at random bytes."""
    for step in (1, 2):
        store.save(state_of(step), meta_of(step), metrics=judged(2 + step))
    store.close()
    files = sorted(path for path in store.folder.rglob("*") if path.is_file())
    kinds = [[path for path in files if kind in path.parts] for kind in ("state", "meta", "metrics")]
    target = jax.eval_shape(lambda: state_of(0))
    saved = {step: (meta_of(step), bits(state_of(step))) for step in (1, 2)}
    chance, same, said = random.Random(seconds), 0, []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        folder = tmp_path / "damaged"
        shutil.copytree(store.folder, folder)
        path: Path = chance.choice(chance.choice([*kinds, files]))
        (folder / path.relative_to(store.folder)).write_bytes(damaged(chance, path.read_bytes()))
        try:
            opened = Checkpoints(folder, read_only=chance.random() < 0.5)
            try:
                which, expected = chance.choice([("last", 2), ("best", 1)])
                step = opened.pick(which)
                assert step == expected
                assert (opened.meta(step), bits(opened.restore(step, target))) == saved[step]
            finally:
                opened.close()
            same += 1
        except UserError as e:
            said.append(str(e))
        shutil.rmtree(folder)
    print(f"{same} the same, {len(said)} refused")
    assert all(len(line.splitlines()) == 1 and str(tmp_path / "damaged") in line for line in said)
    assert min(same, len(said)) > 2


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "3/meta/metadata"),
        OSError(5, "Input/output error", "3/meta/metadata"),
        ValueError('PERMISSION_DENIED: Error opening "zarr" driver'),  # tensorstore
        MemoryError(),
    ],
)
def test_what_cannot_be_read_may_be_whole(error, store, monkeypatch):
    store.save(state_of(3), meta_of(3))
    store.wait()
    reader = store.again(read_only=True)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(reader._manager, "restore", refuse)
    for ask in (lambda: reader.meta(3), lambda: reader.restore(3, state_of(0))):
        with pytest.raises(UserError, match=r"can't be used .* If it is damaged, remove"):
            ask()


def test_badness_orders_by_errors_then_loss():
    order = [(0, 0.0), (0, 1.0), (0, 1e6), (0, float("inf")), (1, 0.1), (1, 5.0), (2, 0.0), (1000, 0.1), (1000, 0.2)]
    found = [selection_metric(judged(e, loss)) for e, loss in order]
    assert found == sorted(found)
    assert selection_metric(judged(0, 1e6)) < selection_metric(judged(1, 0.1))


def test_what_was_saved_before_its_evaluation_is_replaced_after_it(store):
    store.save(state_of(3), meta_of(3))
    store.save(state_of(3), meta_of(3) | {"phase": "again"})  # broken off once more: it is there already
    store.wait()
    assert store.meta(3)["phase"] == "head"
    store.save(state_of(3), meta_of(3) | {"phase": "judged"}, metrics=judged(2))
    store.wait()
    assert (store.steps(), store.meta(3)["phase"], store.pick("best")) == ([3], "judged", 3)
    assert bits(store.restore(3, state_of(0))) == bits(state_of(3))


def test_a_checkpoint_that_goes_while_it_is_read_is_not_called_damaged(store):
    store.save(state_of(3), meta_of(3))
    store.wait()
    reader = store.again(read_only=True)
    store.save(state_of(5), meta_of(5))
    store.wait()
    with pytest.raises(UserError, match="has removed this checkpoint"):
        reader.restore(3, state_of(0))


@pytest.mark.parametrize("strike", ["rename", "save", "wait_until_finished"])
def test_broken_off_while_one_is_replaced_it_is_still_there(store, monkeypatch, strike):
    """Killed, that is: nothing is tidied up behind it. It is the only one, of a first epoch."""
    store.save(state_of(5), meta_of(5))
    store.wait()
    owner = os if strike == "rename" else store._manager
    whole, calls = getattr(owner, strike), []

    def killed(*words, **more):
        calls.append(None)
        if strike != "save":
            whole(*words)
        if len(calls) == (2 if strike == "wait_until_finished" else 1):  # the first of these waits for the save before
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_restore_moved", lambda: None)
        patch.setattr(owner, strike, killed)
        with pytest.raises(KeyboardInterrupt):
            store.save(state_of(5), meta_of(5), metrics=judged(1))
    later = store.again()
    assert (later.steps(), bits(later.restore(5, state_of(0)))) == ([5], bits(state_of(5)))
    later.save(state_of(5), meta_of(5) | {"phase": "judged"}, metrics=judged(1))
    later.wait()
    assert (later.steps(), later.meta(5)["phase"]) == ([5], "judged")
    assert not [path for path in later.folder.iterdir() if path.name.startswith(".")]


def test_a_full_disk_while_one_is_replaced_leaves_it(store, monkeypatch):
    store.save(state_of(5), meta_of(5))
    store.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store._manager, "save", full)
        with pytest.raises(RunError, match="No space left"):
            store.save(state_of(5), meta_of(5), metrics=judged(1))
    assert (store.steps(), bits(store.restore(5, state_of(0)))) == ([5], bits(state_of(5)))
