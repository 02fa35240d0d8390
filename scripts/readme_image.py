"""Draws the image of the README from a finished quick start: python scripts/readme_image.py [--run runs/quickstart].

It shows two right predictions of each class, and the four images whose true class got the lowest probability.
"""

import argparse
import csv
from pathlib import Path

from jaxcats.common.cli import from_file
from jaxcats.plots import gallery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--out", type=Path, default=Path(".github/quickstart.png"))
    args = parser.parse_args()
    root = Path(from_file(args.run / "config.yaml").data.root)
    with (args.run / "predictions.csv").open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        row["probability"] = float(row[f"p_{row['label']}"])
    right = [r for r in rows if r["label"] == r["predicted"]]
    chosen = [r for name in sorted({r["label"] for r in rows}) for r in [x for x in right if x["label"] == name][:2]]
    chosen += sorted(rows, key=lambda r: r["probability"])[:4]
    titles = [f"{r['label'][:-1]}: said {r['predicted'][:-1]}, {float(r['p_' + r['predicted']]):.0%}" for r in chosen]
    figure = gallery([root / r["path"] for r in chosen], titles, wrong=[r["label"] != r["predicted"] for r in chosen])
    args.out.parent.mkdir(exist_ok=True)
    figure.savefig(args.out, dpi=80)
    print(args.out)


if __name__ == "__main__":
    main()
