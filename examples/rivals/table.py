"""Mean and standard error over the seeds of the runs under a directory, as a table in Markdown."""

import json
import math
import statistics
import sys
from pathlib import Path


def percent(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def main(directory: Path) -> None:
    runs: dict[tuple[str, ...], list[Path]] = {}
    for path in sorted(directory.glob("*/*/*-*.json")):
        runs.setdefault((*path.parts[-3:-1], path.stem.rpartition("-")[0]), []).append(path)
    print("| task | algorithm | rate | solved | benchmark: rules | benchmark: stored | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (task, rate, name), paths in runs.items():
        cells = [percent([json.loads(path.read_bytes())["accuracy"] for path in paths])]
        files = [file for path in paths if (file := path.with_suffix(".benchmark")).exists()]
        for measure in ("accuracy", "stored"):
            found = [json.loads(file.read_bytes())[measure] for file in files]
            cells.append(percent(found) if found else "")
        print("|", " | ".join([task, name, rate, *cells, str(len(paths))]), "|")


main(Path(sys.argv[1]))
