"""scripts/benchmark.py: one JSON line for each part, in turns with another command, and mistakes said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
QUICK = ["--rounds", "1", "--seconds", "0.1"]


def benchmark(*argv, check=True):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark.py"), *argv], capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def line(*argv):
    (found,) = benchmark(*argv).stdout.splitlines()
    return json.loads(found)


@pytest.mark.slow
@pytest.mark.parametrize("what", [["lr_find", "--limit", "128"], ["head", "--limit", "128"]])
def test_a_part_is_one_line_with_its_facts(what):
    found = line(*what, *QUICK)
    assert found["what"] == what[0]
    assert found["images_per_second"]["best"] >= found["images_per_second"]["median"] > 0
    assert found["compile_seconds"] > 0
    assert found["peak_memory_bytes"] > 1 << 20
    assert {"python", "jax", "flax"} <= set(found["versions"])


def test_decoding_needs_photos_and_says_so():
    done = benchmark("decode", check=False)
    assert done.returncode == 2
    assert "--root" in done.stderr.splitlines()[-1]


def test_in_turns_with_a_command_the_ratio_is_ours_over_theirs():
    peer = f'{sys.executable} -c "print(\'{{\\"speed\\": {{\\"best\\": 2.0}}}}\')"'
    found = line(
        "ceiling",
        *QUICK,
        "--size",
        "64",
        "--pairs",
        "2",
        "--key",
        "wall_seconds",
        "--peer",
        peer,
        "--peer-key",
        "speed.best",
    )
    assert found["peer"]["speed"] == {"best": 2.0}
    assert len(found["ratios"]) == 2
    assert found["ratio"] == pytest.approx(sum(found["ratios"]) / 2, abs=2e-3)
    done = benchmark(
        "ceiling", *QUICK, "--size", "64", "--key", "wall_seconds", "--peer", peer, "--peer-key", "worst", check=False
    )
    assert done.returncode == 1
    assert "no 'worst' in" in done.stderr


def test_the_table_shows_what_was_measured_and_keeps_what_was_written(tmp_path):
    sys.path.insert(0, str(SCRIPTS))
    try:
        import benchmark_table
    finally:
        sys.path.remove(str(SCRIPTS))
    name, (_, key, _, _, peer_key, less) = next(iter(benchmark_table.ROWS.items()))
    one = {
        "images_per_second": {"median": 123.4},
        "peer": {"features_img_s": {"median": 61.7}, "torch": "2"},
        "ratio": 2.0,
        "ratios": [1.9, 2.1],
        "commands": ["ours", "theirs"],
    }
    lines = {
        "ceiling": {"versions": {}, "gflop_per_second": {"best": 1, "a": 1}, "copy_gb_read_and_written_per_second": {}},
        name: {"row": name, "key": key, "peer_key": peer_key, "less": less, "best": one, "usual": one},
    }
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    out = tmp_path / "B.md"
    out.write_text("old\n## Log\nby hand\n")
    argv = ["--root", "x", "--render", "--lines", str(tmp_path / "lines.json"), "--out", str(out)]
    subprocess.run([sys.executable, str(SCRIPTS / "benchmark_table.py"), *argv], check=True)
    text = out.read_text()
    assert "| 123.4 img/s | 61.7 img/s | **2.00** (1.90, 2.10) |" in text
    assert text.endswith("## Log\nby hand\n")
    assert "old" not in text
