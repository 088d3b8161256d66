"""Run the lectures' claims: print what was measured, draw it, and with all of them write docs/lectures.md.

make lectures [ONLY="training chain"]
"""

import argparse
import importlib
import inspect
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from threadpoolctl import threadpool_limits
from tqdm import tqdm

import cybn

LECTURES = [
    "equations",
    "placement",
    "optimizers",
    "gradients",
    "feature_maps",
    "inference",
    "noise",
    "scaling",
    "training",
    "shift",
    "smoothness",
    "chain",
]  # in the order of the page

PAGE = """\
# The lectures' claims, run

What lectures and textbooks say about batch normalization, each claim as an experiment on real data. `make lectures`
runs all of them and writes this page ({seconds:.0f} s on {cores} cores); `make lectures ONLY=chain` runs one. The
scripts are in [examples/lectures](../examples/lectures), the networks that they train in
[networks.py](../examples/networks.py).

Figures are medians over several seeds, with their range in brackets or as a band, unless they say otherwise. A verdict
says what was seen here, on small networks and small data; it is no proof of a claim, nor against it. "The paper" is
Ioffe and Szegedy, "Batch Normalization" (2015), "the textbook" Goodfellow, Bengio and Courville, *Deep Learning*
(2016), section 8.7.1; later work is cited where it is measured.

| claim | verdict | |
|---|---|---|
{table}

{sections}"""

SECTION = """\
## {title}

{claims}

{method}

![{title}](lectures/{name}.png)

```text
{numbers}
```

{verdicts}

([{name}.py](../examples/lectures/{name}.py))
"""


def one_thread():
    """Trials run side by side, one in each process: a second thread would only be in the way of another's first."""
    threadpool_limits(1)
    cybn.set_num_threads(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="*", metavar="lecture", help=f"of {', '.join(LECTURES)}; all by default")
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="where the page and the figures go (%(default)s)"
    )
    args = parser.parse_args()
    unknown = set(args.only) - set(LECTURES)
    if unknown:
        parser.error(f"lectures are {', '.join(LECTURES)}, got {', '.join(sorted(unknown))}")
    folder = args.docs / "lectures"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    cores = cybn.get_num_threads()
    sections, table = [], []
    with (
        ProcessPoolExecutor(cores, initializer=one_thread) as pool,
        tqdm(args.only or LECTURES, unit="lecture", ncols=100) as lectures,
        tqdm(unit="trial", ncols=100, position=1, leave=False) as trials,
    ):

        def run(function, *columns):
            columns = [list(column) for column in columns]
            trials.reset(total=len(columns[0]))
            for result in pool.map(function, *columns):
                trials.update()
                yield result

        for name in lectures:
            lectures.set_description(name)
            lecture = importlib.import_module(f"lectures.{name}")
            measured = lecture.measure(run)
            lines = list(lecture.numbers(measured))
            verdicts = list(lecture.verdicts(measured))
            lecture.draw(measured).savefig(folder / f"{name}.png")
            title, method = inspect.getdoc(lecture).split("\n", 1)
            told = [f"{claim} {held.lower()}: {sentence}" for claim, held, sentence in verdicts]
            lectures.write("\n".join([f"\n{title}", *lines, *map(wrapped, told)]))
            sections.append(
                SECTION.format(
                    title=title,
                    claims="\n".join(f"- **{claim}** {statement}" for claim, statement in lecture.CLAIMS.items()),
                    method=method.strip(),
                    name=name,
                    numbers="\n".join(lines),
                    verdicts="\n".join(f"- **{claim} {held.lower()}.** {text}" for claim, held, text in verdicts),
                )
            )
            table += [f"| {claim} | {held} | [{title}](#{anchor(title)}) |" for claim, held, _ in verdicts]
    if not args.only:
        page = PAGE.format(
            seconds=time.perf_counter() - start,
            cores=cores,
            table="\n".join(table),
            sections="\n".join(sections),
        )
        (args.docs / "lectures.md").write_text(page)
        print(f"\n{args.docs / 'lectures.md'}; {time.perf_counter() - start:.0f} s in all")


def wrapped(text):
    return textwrap.fill(text, 100, subsequent_indent="    ")


def anchor(title):
    """The name that Markdown gives a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


if __name__ == "__main__":
    main()
