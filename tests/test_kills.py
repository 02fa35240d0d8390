"""Trainings killed at random moments and resumed; scripts/kill_campaign.py does it, with a real network, fifty times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "kill_campaign.py"


@pytest.mark.slow
def test_five_killed_at_random_and_resumed_end_like_the_undisturbed_one(tmp_path):
    words = [
        "--runs",
        5,
        "--import",
        "tiny",
        "--backbone",
        "tiny",
        "--random",
        "--size",
        32,
        "--out",
        tmp_path / "out.json",
    ]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["same"], found["wrong"]) == (5, {})
    assert sum(found["kills"].values()) >= 5
