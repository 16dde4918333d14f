"""Command line: `python -m mfrsvlm.evaluation run ...` and `python -m mfrsvlm.evaluation report ...`."""

import argparse
import logging
import sys

from . import report, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mfrsvlm.evaluation", description="Measures models on benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="answers the questions of one benchmark and scores the answers")
    run.add_arguments(measure)
    tell = commands.add_parser("report", help="tables, plot and model card from what runs wrote")
    report.add_arguments(tell)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.command == "report":
            report.report(args)
        elif run.run(args):  # on the first process
            print(report.as_markdown(report.make_tables(report.read_summaries([args.output]))))
    except (ValueError, OSError) as error:
        # The user's to mend: told in a line. Anything else is a fault of the program and shows where it is.
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
