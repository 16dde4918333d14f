"""Command line of the evaluation.

python -m mfrsvlm.evaluation run --model demo/model --benchmark scenes --limit 200 --output runs/scenes
python -m mfrsvlm.evaluation report runs/scenes --output report
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..arguments import ArgumentParser, add_dtype_argument, add_loading_arguments
from ..files.writing import check_file, check_folder
from .settings import EvaluationSettings


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m mfrsvlm.evaluation", description="Evaluates models on benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add_arguments, command, description in (
        ("run", add_run_arguments, "mfrsvlm evaluate", "Evaluates one model on one or more benchmarks."),
        ("report", add_report_arguments, "mfrsvlm report", "Writes tables, plots and model cards from finished runs."),
    ):
        add_arguments(commands.add_parser(name, prog=command, description=description, help=description))
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = EvaluationSettings()
    what = parser.add_argument_group("what to evaluate")
    what.add_argument("--model", help="folder or Hub id of an image-text-to-text model")
    what.add_argument("--revision", help="branch, tag or commit of a Hub id")
    what.add_argument("--name", help="name of the model in reports; default: its Hub id, or the name of its folder")
    what.add_argument("--baseline", choices=["majority"], help="evaluate the majority baseline instead of a model")
    what.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME[/SPLIT][=FOLDER]",
        help="benchmarks, each with its split and the folder of its files; see docs/benchmarks.md",
    )
    what.add_argument("--data", help="folder of the benchmark, if there is only one")
    what.add_argument("--split", help="split of the benchmark, if there is only one; default: its test split")
    what.add_argument("--protocol", default="strict", help="default: strict; see docs/evaluation.md")
    what.add_argument("--output", type=Path, help="folder for the files of each benchmark; default: print the tables only")
    what.add_argument("--limit", type=int, help="number of questions to sample from each benchmark; default: all")
    what.add_argument("--seed", type=int, default=defaults.seed, help="seed of the sampling; default: %(default)s")
    what.add_argument("--blind", action="store_true", help="ask without the images")
    how = parser.add_argument_group("how to run")
    how.add_argument("--batch-size", type=int, default=defaults.batch_size, help="questions per batch; default: %(default)s")
    how.add_argument(
        "--images-per-chunk",
        type=int,
        default=defaults.images_per_chunk,
        help="images whose features are in memory at the same time; default: %(default)s",
    )
    add_dtype_argument(how)
    add_loading_arguments(how)
    how.add_argument("--no-sharing", action="store_true", help="encode the images again for every question")
    how.add_argument("--allow-count-mismatch", action="store_true", help="accept splits of another size than published")
    how.add_argument("--allow-size-mismatch", action="store_true", help="accept images of another size than published")
    how.add_argument("--classes", nargs="+", metavar="CLASS", help="load only these classes")
    how.add_argument("--skip-broken-rows", action="store_true", help="skip rows that cannot be used")
    add_outside_argument(how)
    how.add_argument(
        "--missing-images",
        choices=["error", "wrong"],
        default="error",
        help="error: stop; wrong: score questions about unreadable images 0; default: %(default)s",
    )


def add_outside_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--allow-outside-images", action="store_true", help="open images outside of the folder, through links or URLs"
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, help="folder for results.md, results.csv and the plots")
    parser.add_argument("--latex", action="store_true", help="also write results.tex")
    parser.add_argument("--card", type=Path, metavar="MODEL_FOLDER", help="write the results into the card of this folder")
    parser.add_argument("--model", help="name in the runs of the model of --card; default: the name of its folder")
    parser.add_argument("--published", type=Path, help="file of published results; default: the one of this package")
    parser.add_argument("--no-plots", action="store_true", help="leave out the plots, which need matplotlib")
    parser.add_argument(
        "--pictures", type=int, metavar="N", help="draw N questions of each run with image, answer and truth; needs --output"
    )
    parser.add_argument("--data", help="folder of the benchmark, for --pictures")
    add_outside_argument(parser)


def run(args: argparse.Namespace) -> None:
    # Imported here, so that `--help` and errors about options need not import torch.
    from . import evaluate, evaluate_majority, load_benchmark
    from .answering import load
    from .benchmarks import BENCHMARKS
    from .evaluate import get_protocol, make_runs, process_state
    from .report import as_markdown, make_tables, parse_summary

    if (args.model is None) == (args.baseline is None):
        raise ValueError("Name what to evaluate: either --model or --baseline majority.")
    if len(args.benchmark) > 1 and (args.data or args.split):
        raise ValueError("--data and --split belong to one benchmark. Name several as NAME/SPLIT=FOLDER.")
    if args.output:
        check_folder(args.output)
    settings = EvaluationSettings(
        output=args.output,
        model_name=args.name,
        limit=args.limit,
        seed=args.seed,
        blind=args.blind,
        batch_size=args.batch_size,
        images_per_chunk=args.images_per_chunk,
        share_images=not args.no_sharing,
        missing_images=args.missing_images,
    )
    protocol = get_protocol(args.protocol)
    options = {"classes": args.classes} if args.classes else {}
    options |= {"broken_rows": "skip"} if args.skip_broken_rows else {}
    benchmarks = []
    for text in args.benchmark:
        place, _, folder = text.partition("=")
        name, _, split = place.partition("/")
        benchmarks.append(
            load_benchmark(
                name,
                folder or args.data,
                split or args.split or protocol.default_split(BENCHMARKS.get(name)),
                check_counts=not args.allow_count_mismatch,
                check_sizes=not args.allow_size_mismatch,
                check_images=args.missing_images == "error" and not args.blind and not args.baseline,
                allow_outside_images=args.allow_outside_images,
                **options,
            )
        )
    state = process_state()
    if args.baseline:
        summaries = evaluate_majority(benchmarks, protocol, settings)
    else:
        make_runs(benchmarks, protocol, settings, mode="blind" if args.blind else "image")  # all checks, before the model
        model, processor = load(
            args.model, args.revision, args.dtype, state.device, args.trust_remote_code, args.allow_incomplete
        )
        summaries = evaluate(model, processor, benchmarks, protocol, settings)
    if state.is_main_process:
        tables = make_tables([parse_summary(fields, Path(key)) for key, fields in summaries.items()])
        print(as_markdown(tables), end="")


def report(args: argparse.Namespace) -> None:
    from ..model_card.results import update_card
    from .pictures import write_pictures
    from .plots import write_plots, write_reliability
    from .report import (
        PUBLISHED,
        as_markdown,
        make_tables,
        read_published,
        read_summaries,
        write_report,
    )

    if args.output:
        check_folder(args.output)
    if args.card and (args.card / "README.md").exists():
        check_file(args.card / "README.md")
    if args.pictures is not None and (args.pictures < 1 or not args.output):
        raise ValueError(f"--pictures {args.pictures} must be at least 1, and needs --output.")
    summaries, published = read_summaries(args.runs), args.published or PUBLISHED
    if args.output:
        tables = write_report(summaries, args.output, published, args.latex)
        if not args.no_plots:
            write_plots(tables, args.output)
            write_reliability(summaries, args.output)
        if args.pictures is not None:
            write_pictures(summaries, args.output, args.pictures, args.data, args.allow_outside_images)
    else:
        tables = make_tables(summaries, read_published(published))
    print(as_markdown(tables), end="")
    if args.card:
        written = update_card(args.card, summaries, args.model)
        print(f"\n{args.card / 'README.md'}: {len(written)} figures written")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        report(args) if args.command == "report" else run(args)
    except (ValueError, OSError) as error:
        # Errors that the user can correct. All others are bugs and keep their traceback.
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
