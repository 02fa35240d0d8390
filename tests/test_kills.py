"""scripts/kill_campaign.py with a tiny network: trainings that are killed at random moments and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "kill_campaign.py"


@pytest.mark.slow
def test_five_killed_at_random_and_resumed_end_like_the_undisturbed_one(tmp_path):
    options = ["--runs", 5, "--import", "tiny", "--backbone", "tiny", "--random", "--size", 32]
    options += ["--out", tmp_path / "out.json"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["same"], result["wrong"]) == (5, {})
    assert sum(result["kills"].values()) >= 5
