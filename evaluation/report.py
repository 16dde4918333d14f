"""Turns the summaries of runs into tables beside published results, plots, and the `model-index` of a model card.

    python -m mfrsvlm.evaluation report OUT1 OUT2 --output DIR --card MODEL_FOLDER

A table holds what may be compared: one benchmark, split, protocol and task. In it a run of a model on images is a row; runs
without the image, by chance, or on a part of the split are rows set in italics, never taken for a result. Published results
stand below a line, each with its source and a note on how far it compares.

Shares are shown in per cent, and CIDEr times 100, as captioning papers do; `PLAIN` figures are shown as they are. The CSV
and the model card hold every value as it was measured.
"""

import argparse
import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..model_card.results import update_card


FORMAT = 1  # of summary.json
MODES = ("image", "blind", "chance")
PUBLISHED = Path(__file__).with_name("published.json")
PLAIN = {"mae": 2, "ece": 3, "brier": 3}  # figures that are no shares, and the decimals they are shown with
MOST_GROUPS = 10  # so many question types get a column each
UNITS = "Shares in per cent and CIDEr times 100, with 95 % bootstrap intervals; n is the number of samples."


class ReportError(ValueError):
    """A summary, a published row or a model card that cannot be reported; the message names it."""


@dataclass(frozen=True)
class Column:
    """A figure of a task, or its value for one group (a question type, a class)."""

    figure: str
    group: str = ""

    @property
    def is_share(self) -> bool:
        return self.figure not in PLAIN and self.figure != "cider"

    def __str__(self) -> str:
        return self.group or self.figure


@dataclass(frozen=True)
class Cell:
    """A value with its 95 % interval and the samples behind it; a published one has neither."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Summary:
    """What one run measured, as read from its summary.json."""

    folder: Path
    benchmark: str
    split: str
    protocol: str
    mode: str
    model: str
    revision: str | None  # of the weights: of the Hub, or a fingerprint
    fingerprint: str | None
    dtype: str | None
    limit: int | None
    missing_images: int
    in_split: int  # samples that the files held
    published: int | None  # and should have held
    results: dict[str, dict[Column, Cell]]  # by task

    @property
    def is_complete(self) -> bool:
        """Whether this is a result of the model on the whole split."""
        return self.mode == "image" and not self.shortcomings

    @property
    def mode_in_words(self) -> str:
        return ", ".join([self.mode, *self.shortcomings])

    @property
    def shortcomings(self) -> list[str]:
        """What keeps the run from being one on the whole split."""
        limit = [f"limit {self.limit}"] if self.limit is not None else []
        missing = [f"{self.missing_images} images missing"] if self.missing_images else []
        differs = self.published is not None and self.in_split != self.published
        return [*limit, *missing, *([f"{self.in_split} of {self.published} samples"] if differs else [])]

    def __str__(self) -> str:
        return (
            f"{self.model} on {self.benchmark}, {self.split}, protocol {self.protocol}, {self.mode_in_words}, {self.folder}"
        )


@dataclass(frozen=True)
class Reference:
    """Where published numbers stand, and how far they compare with ours."""

    source: str
    url: str
    note: str


@dataclass(frozen=True)
class PublishedRow:
    """What somebody else measured."""

    model: str
    benchmark: str
    split: str
    task: str
    cells: dict[Column, Cell]
    reference: Reference


@dataclass(frozen=True)
class Table:
    """What may be compared: the runs and published rows of one benchmark, split, protocol and task."""

    benchmark: str
    split: str
    protocol: str
    task: str
    columns: list[Column]
    left_out: dict[str, int]  # figures with too many groups for columns, and how many
    runs: list[tuple[str, Summary]]  # with the names of their models
    published: list[PublishedRow]

    @property
    def title(self) -> str:
        return f"{self.benchmark}, {self.split}, protocol {self.protocol}: {self.task}"

    @property
    def header(self) -> list[str]:
        return ["model", "mode", "n", *map(str, self.columns)]

    def texts(self, name: str, summary: Summary) -> list[str]:
        """The row of a run. Its n is that of the task as a whole; those of groups are in the CSV."""
        cells = summary.results[self.task]
        n = max((cell.n or 0 for cell in cells.values()), default=0)
        return [name, summary.mode_in_words, str(n), *(show(column, cells.get(column)) for column in self.columns)]

    @property
    def shares(self) -> list[Column]:
        """What a plot has an axis for."""
        measured = {column for _, summary in self.runs for column in summary.results[self.task]}
        return [column for column in self.columns if column.is_share and column in measured]

    @property
    def references(self) -> list[Reference]:
        """Of the published rows; those of one source with one note share a number."""
        return list(dict.fromkeys(row.reference for row in self.published))

    @property
    def notes(self) -> list[str]:
        notes = [f"The {n} values of {figure} are in results.csv." for figure, n in self.left_out.items()]
        if any(not summary.is_complete for _, summary in self.runs):
            notes.append(
                "In italics: no result of the model on the whole split. Blind runs see no image, chance is the best guess "
                "without a model, a limit asks only some of the questions."
            )
        return notes


def show(column: Column, cell: Cell | None) -> str:
    """`91.2 [89.9, 92.4]`; a published value as it was printed."""
    if cell is None:
        return "-"
    factor, decimals = (1, PLAIN[column.figure]) if column.figure in PLAIN else (100, 1)
    if cell.n is None:
        return f"{factor * cell.value:.6g}"
    value, low, high = (f"{factor * number:.{decimals}f}" for number in (cell.value, cell.low, cell.high))
    return f"{value} [{low}, {high}]"


# Reading


def read_summaries(folders: Iterable[str | Path]) -> list[Summary]:
    """Reads the summary.json of each folder.

    Raises:
        ReportError: a folder without a summary, a summary that is cut off, of another format or without a field, or two
            runs of the same model on the same benchmark, split and protocol in the same mode.
    """
    summaries: dict[tuple[str | None, ...], Summary] = {}
    for summary in map(read_summary, map(Path, folders)):
        run = (summary.model, summary.revision, summary.benchmark, summary.split, summary.protocol, summary.mode)
        if run in summaries:
            raise ReportError(f"One run is given twice; leave out one of: {summaries[run]}; {summary}")
        summaries[run] = summary
    if not summaries:
        raise ReportError("There is nothing to report: name the folders of one or more runs.")
    return list(summaries.values())


def read_summary(folder: Path) -> Summary:
    path = folder / "summary.json"
    if not path.is_file():
        raise ReportError(
            f"{folder} holds no summary.json, which a run writes at its end. Name the folder of a finished run."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not whole JSON ({error}): the run was cut off. Run it again.") from error
    found = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
    if found != FORMAT:
        raise ReportError(f"{path} has format {found!r}, but only format {FORMAT} is read. Run the evaluation again.")
    try:
        if fields["mode"] not in MODES:
            raise ReportError(f"{path} has mode {fields['mode']!r}, not one of {', '.join(MODES)}.")
        return Summary(
            folder=folder,
            benchmark=fields["benchmark"],
            split=fields["split"],
            protocol=fields["protocol"],
            mode=fields["mode"],
            model=fields["model"]["name"],
            # The weights of a folder have no revision, and those of chance do not exist.
            revision=fields["model"].get("revision") or fields["model"].get("fingerprint"),
            fingerprint=fields["model"].get("fingerprint"),
            dtype=fields["model"].get("dtype"),
            limit=fields["limit"],
            missing_images=fields["counts"]["missing_images"],
            in_split=fields["counts"]["in_split"],
            published=fields["counts"]["published"],
            results={
                task: read_figures(figures, f"{path}, {task}", measured=True) for task, figures in fields["results"].items()
            },
        )
    except KeyError as error:
        raise ReportError(f"{path} has no field {error}. Run the evaluation again.") from error


def read_figures(figures: dict[str, Any], where: str, measured: bool) -> dict[Column, Cell]:
    """Figures by name, or by name and group: objects with value, low, high and n if measured, else numbers."""
    cells = {}
    for name, figure in figures.items():
        grouped = isinstance(figure, dict) and "value" not in figure
        for group, member in figure.items() if grouped else [("", figure)]:
            column = Column(name, group)
            it = f"{where}: {name} {group}".rstrip()
            try:
                cell = Cell(**member) if measured else Cell(member)
                finite = all(map(math.isfinite, (cell.value, cell.low, cell.high, cell.n) if measured else [cell.value]))
            except TypeError as error:
                expected = "an object with value, low, high and n" if measured else "a number"
                raise ReportError(f"{it} is {member!r}, not {expected}.") from error
            if not finite:
                raise ReportError(f"{it} is {member!r}: nothing was measured.")
            if column.is_share and not 0 <= cell.value <= 1:
                raise ReportError(f"{it} is {cell.value}, but a share lies from 0 to 1 (`PLAIN` names what is none).")
            cells[column] = cell
    return cells


def read_published(path: str | Path = PUBLISHED) -> list[PublishedRow]:
    """Reads published results, a list of rows. Figures are in the units of ours: shares from 0 to 1, CIDEr not times 100.

    Raises:
        ReportError: a row without a source or a note, or with a value that cannot be one.
    """
    rows = []
    for number, row in enumerate(json.loads(Path(path).read_text(encoding="utf-8")), start=1):
        where = f"{path}, row {number} ({row.get('model')} on {row.get('benchmark')})"
        source = row.get("source")
        if not isinstance(source, dict) or source.keys() != {"title", "place", "url"}:
            raise ReportError(f"{where} has no whole source: it needs title, place (a table or section) and url.")
        for name, text in {**source, "note": row.get("note")}.items():
            if not text:
                raise ReportError(f"{where} has an empty {name}: say where the numbers stand and how far they compare.")
        rows.append(
            PublishedRow(
                model=row["model"],
                benchmark=row["benchmark"],
                split=row["split"],
                task=row["task"],
                cells=read_figures(row["figures"], where, measured=False),
                reference=Reference(f"{source['title']}, {source['place']}", source["url"], row["note"]),
            )
        )
    return rows


# Tables


def make_tables(summaries: Sequence[Summary], published: Sequence[PublishedRow] = ()) -> list[Table]:
    """One table a benchmark, split, protocol and task, in the order of the summaries."""
    revisions = {(summary.model, summary.revision) for summary in summaries}

    def name(summary: Summary) -> str:  # with the revision only where it tells two apart
        several = sum(model == summary.model for model, _ in revisions) > 1
        return f"{summary.model}@{str(summary.revision)[:7]}" if several else summary.model

    tables = []
    for place in dict.fromkeys((s.benchmark, s.split, s.protocol, task) for s in summaries for task in s.results):
        benchmark, split, _, task = place
        runs = [(name(s), s) for s in summaries if (s.benchmark, s.split, s.protocol, task) == place and task in s.results]
        runs.sort(key=lambda run: (run[1].mode == "chance", run[0], MODES.index(run[1].mode)))
        others = [row for row in published if (row.benchmark, row.split, row.task) == (benchmark, split, task)]
        rows = [summary.results[task] for _, summary in runs] + [row.cells for row in others]
        found = list(dict.fromkeys(column for row in rows for column in row))
        grouped = [column.figure for column in found if column.group]
        left_out = {f: grouped.count(f) for f in grouped if f == "per_class" or grouped.count(f) > MOST_GROUPS}
        columns = sorted((column for column in found if column.figure not in left_out), key=lambda c: bool(c.group))
        tables.append(Table(*place, columns, left_out, runs, others))
    return tables


def as_markdown(tables: Sequence[Table]) -> str:
    lines = ["# Results", "", UNITS]
    runs = [run for table in tables for run in table.runs if run[1].revision]
    if runs:
        weights = dict.fromkeys(f"{name} {summary.revision} in {summary.dtype}" for name, summary in runs)
        lines += ["", f"Weights: {', '.join(weights)}."]
    for table in tables:
        lines += ["", f"## {table.title}", "", markdown_row(table.header), "|---|---|" + "--:|" * (len(table.columns) + 1)]
        for name, summary in table.runs:
            texts = table.texts(name, summary)
            lines.append(markdown_row(texts if summary.is_complete else [f"*{text}*" for text in texts]))
        if table.published:
            lines.append(markdown_row(["**published**", *([""] * (len(table.columns) + 2))]))
        for row in table.published:
            texts = [show(column, row.cells.get(column)) for column in table.columns]
            number = table.references.index(row.reference) + 1
            lines.append(markdown_row([f"{row.model} [{number}]", "published", "", *texts]))
        notes = [f"[{number}] {r.source}, <{r.url}>. {r.note}" for number, r in enumerate(table.references, start=1)]
        for note in table.notes + notes:
            lines += ["", note]
    return "\n".join(lines) + "\n"


def markdown_row(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def as_latex(tables: Sequence[Table]) -> str:
    """Tables for booktabs; the sources stand below them."""
    lines = [r"% Needs \usepackage{booktabs} and \usepackage{url}."]
    for table in tables:
        lines += ["", r"\begin{table}", r"\centering\footnotesize", rf"\caption{{{escape(f'{table.title}. {UNITS}')}}}"]
        lines += [rf"\begin{{tabular}}{{ll{'r' * (len(table.columns) + 1)}}}", r"\toprule"]
        lines += [latex_row(map(escape, table.header)), r"\midrule"]
        for name, summary in table.runs:
            texts = map(escape, table.texts(name, summary))
            lines.append(latex_row(texts if summary.is_complete else (rf"\textit{{{text}}}" for text in texts)))
        if table.published:
            lines += [r"\midrule", latex_row([rf"\multicolumn{{{len(table.header)}}}{{l}}{{published}}"])]
        for row in table.published:
            texts = [show(column, row.cells.get(column)) for column in table.columns]
            number = table.references.index(row.reference) + 1
            lines.append(latex_row([rf"{escape(row.model)}\textsuperscript{{{number}}}", "published", "", *texts]))
        lines += [r"\bottomrule", r"\end{tabular}"]
        notes = [
            rf"\textsuperscript{{{number}}} {escape(r.source)}, \url{{{r.url}}}. {escape(r.note)}"
            for number, r in enumerate(table.references, start=1)
        ]
        lines += [rf"\par\raggedright {note}" for note in [*map(escape, table.notes), *notes]]
        lines.append(r"\end{table}")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    return text.translate(str.maketrans(LATEX_SPECIAL))


def latex_row(texts: Iterable[str]) -> str:
    return " & ".join(texts) + r" \\"


def write_csv(tables: Sequence[Table], path: str | Path) -> None:
    """One line a figure of a run, then one a published figure. What a line does not have is left empty."""
    lines = []
    for table in tables:
        for name, summary in table.runs:
            run = {"benchmark": table.benchmark, "split": table.split, "protocol": table.protocol, "task": table.task}
            run |= {"model": name, "mode": summary.mode, "note": "" if summary.is_complete else summary.mode_in_words}
            lines += [run | asdict(column) | asdict(cell) for column, cell in summary.results[table.task].items()]
    seen: list[PublishedRow] = []
    for row in (row for table in tables for row in table.published):
        if row not in seen:  # it stands in the table of each protocol
            seen.append(row)
            place = {
                "benchmark": row.benchmark,
                "split": row.split,
                "task": row.task,
                "model": row.model,
                "mode": "published",
            }
            place |= {"source": f"{row.reference.source}, {row.reference.url}", "note": row.reference.note}
            lines += [place | asdict(column) | asdict(cell) for column, cell in row.cells.items()]
    columns = "benchmark split protocol model mode task figure group value low high n source note".split()
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


# Plots


def draw(tables: Sequence[Table]) -> Any:
    """The shares of one benchmark, split and protocol with their intervals: a panel a task, a line a figure.

    A colour is a model. Filled marks are results on the whole split, hollow ones blind runs and parts of a split, grey ones
    chance. What is no share has no place on the axis, and published results have no interval: both are in the tables.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ReportError: there is no matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(f"Plots need matplotlib ({error}): pip install matplotlib, or say --no-plots.") from error

    models = list(dict.fromkeys(name for table in tables for name, _ in table.runs))
    palette = matplotlib.colormaps["tab10"] if len(models) <= 10 else matplotlib.colormaps["turbo"].resampled(len(models))
    heights = [len(table.shares) * (0.16 * len(table.runs) + 0.14) for table in tables]
    size = (8, sum(heights) + 0.4 * len(tables) + 0.2 * max(len(table.runs) for table in tables) + 1)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(len(tables), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    marks = {}
    for axis, table in zip(axes, tables, strict=True):
        shares = table.shares
        for run, (name, summary) in enumerate(table.runs):
            colour = "#888888" if summary.mode == "chance" else palette(models.index(name))
            cells = summary.results[table.task]
            lines = [(i, cells[share]) for i, share in enumerate(shares) if share in cells]
            places = [i + 0.8 * ((run + 0.5) / len(table.runs) - 0.5) for i, _ in lines]
            # No error bars: the interval of a biased figure need not hold its value.
            axis.hlines(places, [100 * cell.low for _, cell in lines], [100 * cell.high for _, cell in lines], color=colour)
            label = summary.mode_in_words if summary.mode == "chance" else f"{name} ({summary.mode_in_words})"
            marks[label] = axis.scatter(
                [100 * cell.value for _, cell in lines],
                places,
                s=28,
                marker={"image": "o", "blind": "D", "chance": "s"}[summary.mode],
                facecolor=colour if summary.is_complete else "white",
                edgecolor=colour,
                zorder=3,
            )
        axis.set(yticks=range(len(shares)), yticklabels=list(map(str, shares)), ylim=(len(shares) - 0.5, -0.5))
        axis.set_title(table.task, loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[-1].set(xlim=(-2, 102), xlabel="per cent, with 95 % intervals")
    figure.suptitle(f"{tables[0].benchmark}, {tables[0].split}, protocol {tables[0].protocol}", fontsize=11)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", fontsize=9)
    return figure


def write_plots(tables: Sequence[Table], output: Path) -> None:
    """`plot-BENCHMARK-SPLIT-PROTOCOL.png` of each that has a share to show."""
    plots: dict[str, list[Table]] = {}
    for table in tables:
        if table.shares:
            plots.setdefault(f"{table.benchmark}-{table.split}-{table.protocol}", []).append(table)
    for name, members in plots.items():
        draw(members).savefig(output / f"plot-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.png", dpi=110)


def write_report(
    summaries: Sequence[Summary], output: str | Path, published: str | Path | None = PUBLISHED, plots: bool = True
) -> list[Table]:
    """Writes `results.md`, `results.csv`, `results.tex` and plots into a folder.

    Args:
        summaries: of `read_summaries`.
        output: the folder, made if need be.
        published: file of published rows, `None` for none.
        plots: needs matplotlib.

    Returns:
        The tables, as for `as_markdown`.
    """
    tables = make_tables(summaries, read_published(published) if published else ())
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.md").write_text(as_markdown(tables), encoding="utf-8")
    (output / "results.tex").write_text(as_latex(tables), encoding="utf-8")
    write_csv(tables, output / "results.csv")
    if plots:
        write_plots(tables, output)
    return tables


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `report`."""
    parser.add_argument("runs", nargs="+", type=Path, help="folders that runs were written to")
    parser.add_argument("--output", type=Path, help="folder for results.md, results.csv, results.tex and the plots")
    parser.add_argument("--card", type=Path, metavar="MODEL_FOLDER", help="model folder whose README.md gets the results")
    parser.add_argument("--model", help="name of that model in the runs; that of the folder by default")
    parser.add_argument(
        "--published", type=Path, default=PUBLISHED, help="published results; by default those that come along"
    )
    parser.add_argument("--no-plots", action="store_true", help="do without matplotlib")


def report(args: argparse.Namespace) -> None:
    """Prints the tables as Markdown, and writes what was asked for."""
    summaries = read_summaries(args.runs)
    if args.output:
        tables = write_report(summaries, args.output, args.published, plots=not args.no_plots)
    else:
        tables = make_tables(summaries, read_published(args.published))
    print(as_markdown(tables), end="")
    if args.card:
        print(f"\n{args.card / 'README.md'}: {len(update_card(args.card, summaries, args.model))} figures written")
