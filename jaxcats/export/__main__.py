"""`python -m jaxcats.export --run RUN`: writes the classifier of a run as a folder that can be shipped."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxcats.common.cli import Parser, run_command

DESCRIPTION = "Writes a trained classifier as a folder that has everything `python -m jaxcats.predict` needs."


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m jaxcats.export", description=DESCRIPTION)
    parser.add_argument("--run", required=True, help="run folder that train wrote")
    parser.add_argument("--out", help="folder to write (default: model/ in the run folder)")
    parser.add_argument("--checkpoint", help="last, best or a step (default: the run's checkpoint.use)")
    options = parser.parse_args(argv)
    from jaxcats.evaluate.predictions import read_calibration, read_json
    from jaxcats.evaluate.run import load_run
    from jaxcats.export.program import write_run

    run = load_run(Path(options.run), options.checkpoint)
    calibration = read_calibration(run.folder, run.checkpoint)
    if calibration is None:
        print(
            "No temperature is known for this checkpoint: its probabilities are not calibrated, and it never abstains."
        )
        print(f"To calibrate them: python -m jaxcats.evaluate --run {run.folder}, then export again.")
    metrics = read_json(run.folder / "metrics.json") if calibration else None
    folder = write_run(run, metrics, calibration, out=Path(options.out) if options.out else None)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"Written: {folder} ({size / 1e6:.1f} MB); try: python -m jaxcats.predict --model {folder} IMAGES")


if __name__ == "__main__":
    sys.exit(run_command(main))
