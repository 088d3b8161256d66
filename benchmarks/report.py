"""The table at the end of `make bench`: what asv has just found for this working tree.

python benchmarks/report.py [RESULTS]
"""

import itertools
import json
import sys
from pathlib import Path

from asv.results import Results
from asv.util import human_value

RESULTS = Path(__file__).parents[1] / ".asv" / "here"


def latest(results):
    files = [path for path in results.glob("*/*.json") if path.name != "machine.json"]
    if not files:
        raise SystemExit(f"no results in {results}: run `make bench`")
    return Results.load(str(max(files, key=lambda path: path.stat().st_mtime)))


def readable(value, unit):
    if value is None or value != value:
        return "n/a"
    return human_value(value, unit) if unit in ("seconds", "bytes") else f"{value:.2f} {unit}"


def lines(benchmark, values):
    """A line per combination of parameters; the libraries beside each other, and how far cybn is ahead of NumPy."""
    names = [name for name in benchmark["param_names"] if name != "library"]
    choices = [[value.strip("'") for value in choice] for choice in benchmark["params"]]
    table = dict(zip(itertools.product(*choices), values, strict=True))
    libraries = choices[0] if benchmark["param_names"][:1] == ["library"] else [None]
    for rest in itertools.product(*choices[len(choices) - len(names) :]):
        row = [table[rest if library is None else (library, *rest)] for library in libraries]
        cells = [readable(value, benchmark["unit"]) for value in row]
        found = dict(zip(libraries, row, strict=True))
        ours, theirs = found.get("cybn"), found.get("numpy")
        if benchmark["type"] == "time" and ours and theirs and ours == ours and theirs == theirs:
            cells.append(f"{theirs / ours:.1f}x")
        yield ", ".join(rest), cells


def main():
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    benchmarks = json.loads((results / "benchmarks.json").read_text())
    run = latest(results)
    figures = 0
    for name in sorted(run.get_all_result_keys()):
        benchmark = benchmarks[name]
        values = run.get_result_value(name, run.get_result_params(name))
        figures += len(values)
        heading = [name.rpartition(".")[0]]
        if benchmark["param_names"][:1] == ["library"]:
            heading += [value.strip("'") for value in benchmark["params"][0]]
            heading += ["vs numpy"] if benchmark["type"] == "time" else []
        else:
            heading += [benchmark["name"].rpartition(".")[2]]
        print("\n" + "".join(f"{cell:<44}" if i == 0 else f"{cell:>13}" for i, cell in enumerate(heading)))
        for title, cells in lines(benchmark, values):
            print(f"  {title:<42}" + "".join(f"{cell:>13}" for cell in cells))
    print(f"\n{figures} figures")


if __name__ == "__main__":
    main()
