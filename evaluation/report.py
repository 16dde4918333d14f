"""Reads the summaries of runs, and writes tables with published results for comparison.

A table contains comparable results: one benchmark, split, protocol and task. A run of a model with images is a row. Blind
runs, the majority baseline and runs on a part of the split are rows in italics, since they are not results of the model on
the full split. Published results follow, each with its source and a note on comparability.

Shares are shown in per cent and CIDEr times 100, as in captioning papers. `PLAIN` figures are shown without scaling. The CSV
contains all values without rounding.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.reading import read_json, shorten
from ..files.writing import write_file


FORMAT = 2  # of summary.json
MODES = ("image", "blind", "majority")
PUBLISHED = Path(__file__).with_name("published.json")
PLAIN = {"mae": 2, "count_mae": 2, "ece": 3, "brier": 3}  # figures that are not shares, and their decimals
MAX_GROUPS = 10  # question types that get a column each
UNITS = "Shares in per cent and CIDEr times 100, with 95 % bootstrap intervals; n is the number of samples."


class ReportError(ValueError):
    """A summary or a published row that cannot be reported. The message names it."""


@dataclass(frozen=True)
class Column:
    """A figure of a task, or its value for one group, such as a question type or a class."""

    figure: str
    group: str = ""

    @property
    def is_share(self) -> bool:
        return self.figure not in PLAIN and self.figure != "cider"

    def __str__(self) -> str:
        return self.group or self.figure


@dataclass(frozen=True)
class Cell:
    """A value with its 95 % interval and its number of samples. A published value has neither."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Summary:
    """The results of one run, as read from its summary.json.

    Attributes:
        weights: fingerprint of the weights, or their revision on the Hub if there is no fingerprint.
        in_split: number of samples in the files.
        published: published number of samples of the split.
        left_out: what was left out on purpose, with counts.
        results: figures by task.
        incomplete: what is wrong with the weights, if they were loaded with `--allow-incomplete`.
    """

    folder: Path
    benchmark: str
    split: str
    protocol: str
    mode: str
    model: str
    weights: str | None
    dtype: str | None
    limit: int | None
    missing_images: int
    in_split: int
    published: int | None
    left_out: dict[str, int]
    results: dict[str, dict[Column, Cell]]
    incomplete: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether this is a result of the model on the full split."""
        return self.mode == "image" and not self.shortcomings

    @property
    def mode_in_words(self) -> str:
        weights = ["incomplete weights"] if self.incomplete else []
        return ", ".join([self.mode, *weights, *self.shortcomings])

    @property
    def shortcomings(self) -> list[str]:
        """Why this is not a result on the full split."""
        limit = [f"limit {self.limit}"] if self.limit is not None else []
        missing = [f"{self.missing_images} images missing"] if self.missing_images else []
        differs = self.published is not None and self.in_split != self.published
        left_out = [f"{n} {what} left out" for what, n in self.left_out.items() if n]
        return [*limit, *missing, *left_out, *([f"{self.in_split} of {self.published} samples"] if differs else [])]

    def __str__(self) -> str:
        return (
            f"{self.model} on {self.benchmark}, {self.split}, protocol {self.protocol}, {self.mode_in_words}, {self.folder}"
        )


@dataclass(frozen=True)
class Reference:
    """Source of published results, and a note on comparability."""

    source: str
    url: str
    note: str


@dataclass(frozen=True)
class PublishedRow:
    """A published result of another model."""

    model: str
    benchmark: str
    split: str
    task: str
    cells: dict[Column, Cell]
    reference: Reference


@dataclass(frozen=True)
class Table:
    """The runs and published rows of one benchmark, split, protocol and task.

    Attributes:
        left_out: figures with too many groups for columns, with the number of groups.
        runs: names of models, each with a run.
    """

    benchmark: str
    split: str
    protocol: str
    task: str
    columns: list[Column]
    left_out: dict[str, int]
    runs: list[tuple[str, Summary]]
    published: list[PublishedRow]

    @property
    def title(self) -> str:
        return f"{self.benchmark}, {self.split}, protocol {self.protocol}: {self.task}"

    @property
    def header(self) -> list[str]:
        return ["model", "mode", "n", *map(str, self.columns)]

    def texts(self, name: str, summary: Summary) -> list[str]:
        """The row of a run. Its n is that of the task; the CSV has the n of each group."""
        cells = summary.results[self.task]
        n = max((cell.n or 0 for cell in cells.values()), default=0)
        return [name, summary.mode_in_words, str(n), *(show(column, cells.get(column)) for column in self.columns)]

    @property
    def shares(self) -> list[Column]:
        """The columns that a plot shows."""
        measured = {column for _, summary in self.runs for column in summary.results[self.task]}
        return [column for column in self.columns if column.is_share and column in measured]

    @property
    def references(self) -> list[Reference]:
        """References of the published rows. Rows with the same source and note share a number."""
        return list(dict.fromkeys(row.reference for row in self.published))

    @property
    def notes(self) -> list[str]:
        notes = [f"The {n} values of {figure} are in results.csv." for figure, n in self.left_out.items()]
        if any(not summary.is_complete for _, summary in self.runs):
            notes.append(
                "Rows in italics are not results of the model on the full split. Blind runs get no image. Majority predicts "
                "the most frequent answer to each kind of question. A limit samples some of the questions."
            )
        return notes


def show(column: Column, cell: Cell | None) -> str:
    """`91.2 [89.9, 92.4]`. A published value is shown as it was printed."""
    if cell is None:
        return "-"
    factor, decimals = (1, PLAIN[column.figure]) if column.figure in PLAIN else (100, 1)
    if cell.n is None:
        return f"{factor * cell.value:.6g}"
    value, low, high = (f"{factor * number:.{decimals}f}" for number in (cell.value, cell.low, cell.high))
    return f"{value} [{low}, {high}]"


# Reading


def read_summaries(folders: Iterable[str | Path]) -> list[Summary]:
    """Reads the summary.json of each folder, or those of all folders below it.

    Raises:
        ReportError: a folder without a summary or with an unfinished run; a summary that is truncated, of another format or
            without a field; or two runs of the same model on the same benchmark, split and protocol in the same mode.
    """
    summaries: dict[tuple[str | None, ...], Summary] = {}
    for summary in (read_summary(path) for folder in folders for path in find_summaries(Path(folder))):
        run = (summary.model, summary.weights, summary.benchmark, summary.split, summary.protocol, summary.mode)
        if run in summaries:
            raise ReportError(f"A run is listed twice; leave out one of: {summaries[run]}; {summary}")
        summaries[run] = summary
    if not summaries:
        raise ReportError("There is nothing to report: name the folders of one or more runs.")
    return list(summaries.values())


def find_summaries(folder: Path) -> list[Path]:
    """The summary.json of a folder and of all folders below it."""
    runs = sorted({path.parent for name in ("summary.json", "settings.json") for path in folder.rglob(name)})
    for run in runs or [folder]:
        if not (run / "summary.json").is_file():
            raise ReportError(f"{run} has no summary.json, which a run writes at its end. Name folders of finished runs.")
    return [run / "summary.json" for run in runs]


def read_summary(path: Path) -> Summary:
    try:
        fields = read_json(path, allow_nan=True)  # a figure of nothing
    except ValueError as error:
        raise ReportError(f"The summary is incomplete. Repeat the run: {error}") from error
    return parse_summary(fields, path.parent)


def parse_summary(fields: Any, folder: Path) -> Summary:
    """The content of a summary.json, or what `evaluate` returns for one benchmark.

    Args:
        fields: the summary.
        folder: folder of the run, for messages.
    """
    found = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
    if found != FORMAT:
        raise ReportError(f"{folder}: the summary has format {shorten(found)}, not {FORMAT}. Run the evaluation again.")
    try:
        if fields["mode"] not in MODES:
            raise ReportError(f"{folder}: the summary has mode {shorten(fields['mode'])}, not one of {', '.join(MODES)}.")
        return Summary(
            folder=folder,
            benchmark=fields["benchmark"],
            split=fields["split"],
            protocol=fields["protocol"],
            mode=fields["mode"],
            model=fields["model"]["name"],
            # The fingerprint first, since training a loaded model does not change its revision.
            weights=fields["model"].get("fingerprint") or fields["model"].get("revision"),
            dtype=fields["model"].get("dtype"),
            incomplete=tuple(fields["model"].get("incomplete", ())),
            limit=fields["limit"],
            missing_images=fields["counts"]["missing_images"],
            in_split=fields["counts"]["in_split"],
            published=fields["counts"]["published"],
            left_out=fields["counts"].get("left_out", {}),
            results={
                task: read_figures(figures, f"{folder}, {task}", measured=True)
                for task, figures in fields["results"].items()
            },
        )
    except KeyError as error:
        raise ReportError(f"{folder}: the summary has no field {error}. Run the evaluation again.") from error


def read_figures(figures: dict[str, Any], where: str, measured: bool) -> dict[Column, Cell]:
    """Figures by name, or by name and group. Measured figures have value, low, high and n; published ones are numbers."""
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
                raise ReportError(f"{it} is {shorten(member)}, not {expected}.") from error
            if not finite:
                raise ReportError(f"{it} is {member!r}: nothing was measured.")
            if column.is_share and not 0 <= cell.value <= 1:
                raise ReportError(f"{it} is {cell.value}, but a share lies from 0 to 1 (`PLAIN` lists other figures).")
            cells[column] = cell
    return cells


def read_published(path: str | Path = PUBLISHED) -> list[PublishedRow]:
    """Reads published results, a list of rows. Shares are numbers from 0 to 1, and CIDEr is not multiplied by 100.

    Raises:
        ReportError: a row without a source or a note, or with an impossible value.
    """
    rows = []
    for number, row in enumerate(read_json(path), start=1):
        where = f"{path}, row {number} ({row.get('model')} on {row.get('benchmark')})"
        source = row.get("source")
        if not isinstance(source, dict) or source.keys() != {"title", "place", "url"}:
            raise ReportError(f"{where} needs a source with title, place (table or section) and url.")
        for name, text in {**source, "note": row.get("note")}.items():
            if not text:
                raise ReportError(f"{where} has an empty {name}. State the source of the numbers and their comparability.")
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
    """A table for each benchmark, split, protocol and task, in the order of the summaries."""
    versions = {(summary.model, summary.weights) for summary in summaries}

    def name(summary: Summary) -> str:  # with the weights if two models have the same name
        several = sum(model == summary.model for model, _ in versions) > 1
        return f"{summary.model}@{str(summary.weights)[:7]}" if several else summary.model

    tables = []
    for place in dict.fromkeys((s.benchmark, s.split, s.protocol, task) for s in summaries for task in s.results):
        benchmark, split, _, task = place
        runs = [(name(s), s) for s in summaries if (s.benchmark, s.split, s.protocol, task) == place and task in s.results]
        runs.sort(key=lambda run: (run[1].mode == "majority", run[0], MODES.index(run[1].mode)))
        others = [row for row in published if (row.benchmark, row.split, row.task) == (benchmark, split, task)]
        rows = [summary.results[task] for _, summary in runs] + [row.cells for row in others]
        found = list(dict.fromkeys(column for row in rows for column in row))
        grouped = [column.figure for column in found if column.group]
        left_out = {f: grouped.count(f) for f in grouped if f == "per_class" or grouped.count(f) > MAX_GROUPS}
        columns = sorted((column for column in found if column.figure not in left_out), key=lambda c: bool(c.group))
        tables.append(Table(*place, columns, left_out, runs, others))
    return tables


def as_markdown(tables: Sequence[Table]) -> str:
    lines = ["# Results", "", UNITS]
    runs = [run for table in tables for run in table.runs if run[1].weights]
    if runs:
        weights = dict.fromkeys(f"{name} {summary.weights} in {summary.dtype}" for name, summary in runs)
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
    """Tables for booktabs, with the sources below them."""
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


def as_csv(tables: Sequence[Table]) -> str:
    """A line for each figure of a run, then for each published figure. Fields that do not apply are empty."""
    lines = []
    for table in tables:
        for name, summary in table.runs:
            run = {"benchmark": table.benchmark, "split": table.split, "protocol": table.protocol, "task": table.task}
            run |= {"model": name, "mode": summary.mode, "note": "" if summary.is_complete else summary.mode_in_words}
            lines += [run | asdict(column) | asdict(cell) for column, cell in summary.results[table.task].items()]
    seen: list[PublishedRow] = []
    for row in (row for table in tables for row in table.published):
        if row not in seen:  # the tables of several protocols may contain it
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
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


# Files


def write_report(
    summaries: Sequence[Summary], output: str | Path, published: str | Path | None = PUBLISHED, latex: bool = False
) -> list[Table]:
    """Writes `results.md` and `results.csv` into a folder. `plots.write_plots` adds plots.

    Args:
        summaries: from `read_summaries`.
        output: the folder; created if it does not exist.
        published: file of published rows, `None` for none.
        latex: also writes `results.tex`.

    Returns:
        The tables, as for `as_markdown` and `write_plots`.

    Raises:
        OSError: a file cannot be written.
    """
    tables = make_tables(summaries, read_published(published) if published else ())
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / "results.md", as_markdown(tables))
    write_file(output / "results.csv", as_csv(tables))
    if latex:
        write_file(output / "results.tex", as_latex(tables))
    return tables
