"""Strong gate to weak gate with 20 pictures a class at rank 4, averaged over the trainings of a seed:
the cell of 100 steps in this folder, "short", "vision", and at last "noisy" of ../long.jsonl."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1])]
import bench_accuracy as bench


def differences(path, kind, weak):
    """[seeds] loss of hybrid (1, 0.05) less that of `weak`."""
    lines = {}
    for line in map(json.loads, path.read_text().splitlines()):
        lines[(*line["cell"], line["method"])] = bench.counted(line)[0][:, 0]
    return lines[kind, 20, 4, "hybrid (1, 0.05)"] - lines[kind, 20, 4, weak]


every = [differences(HERE / "default.jsonl", "vision", "hybrid")]
every += [differences(HERE.parent / "long.jsonl", kind, "hybrid (0.1, 0.01)")
          for kind in ("short", "vision", "noisy")]
for count in (3, 4):
    print("{} trainings: {:+.3f} +- {:.3f} (p {:.3f})".format(
        count, *bench.interval(sum(every[:count]) / count)))
