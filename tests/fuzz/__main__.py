"""Runs mutated inputs through the package: python tests/fuzz --count 1000 --seed 0 --area "model folders"

Prints a table of what became of them, and the first failures. Exits with 1 if there are failures.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.harness import AREAS, area_module, as_markdown, run_area


BEGIN, END = "<!-- fuzz -->\n", "<!-- /fuzz -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--count", type=int, default=1000, help="cases of each area, and fewer of slow ones; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--area", action="append", help="area, by its name or module; default: all")
    parser.add_argument("--case", help="run only the case of this name")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table between the marks of this page")
    args = parser.parse_args()
    names = {area_module(stem).AREA: stem for stem in AREAS} | {stem: stem for stem in AREAS}
    unknown = [name for name in args.area or () if name not in names]
    if unknown:
        parser.error(f"unknown area {unknown[0]!r}; areas are {', '.join(names)}")
    results = []
    for stem in dict.fromkeys(names[name] for name in args.area or AREAS):
        if reason := getattr(area_module(stem), "why_not", lambda: None)():
            print(f"{area_module(stem).AREA}: {reason}", file=sys.stderr)
            continue
        # Whoever names an area gets what he asks for.
        count = args.count if args.area else min(args.count, getattr(area_module(stem), "MOST", args.count))
        results.append(run_area(stem, args.seed, count, args.case))
        print(f"{results[-1].area}: {dict(results[-1].counts)}", file=sys.stderr)
    table = as_markdown(results)
    print(table)
    for failure in (failure for result in results for failure in result.failures):
        print(failure)
    if args.write:
        write_between(args.write, f"With `make fuzz N={args.count} SEED={args.seed}`:\n\n{table}")
    return int(any(result.failed for result in results))


def write_between(page: Path, content: str) -> None:
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no lines {BEGIN.strip()} and {END.strip()}.")
    page.write_text(f"{before}{begin}{content}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
