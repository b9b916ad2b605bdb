"""``report``: the table of a run, and the report of a run, an ablation or benchmarks."""

from pathlib import Path
from typing import TYPE_CHECKING

from erniesearch.commands.parsing import command_parser, require_at_least
from erniesearch.errors import UserError
from erniesearch.progress import say

if TYPE_CHECKING:
    from erniesearch.report.document import Document


def report_command(argv: list[str]) -> int:
    """``erniesearch report --run DIR`` or ``--figures FILE …``."""
    parser = command_parser(
        "report", "Write report.html of a run or an ablation, from the files in its folder alone,"
        " and print the table if it is there; or the report of benchmarks' figures.",
    )  # fmt: skip
    add = parser.add_argument
    add("--run", type=str | None, default=None, help="Folder of a finished run. One that goes on"
        " and an ablation's are reported too.")  # fmt: skip
    add("--figures", type=str, nargs="+", default=[], help="JSON files that benchmarks wrote,"
        " instead of --run.")  # fmt: skip
    add("--out", type=str | None, default=None, help="The page; by default report.html in the"
        " folder, or the first file's name with .html.")  # fmt: skip
    add("--watch", action="store_true", help="Write it again whenever something has changed, until"
        " the run has finished or Ctrl-C; an open page loads itself again.")  # fmt: skip
    add("--every", type=int, default=10, help="With --watch: seconds between two looks.")
    add("--baseline", type=str | None, default=None, help="The row of the table that the others are"
        " compared with, query by query; by default the dual-encoder trained on labels"
        " alone.")  # fmt: skip
    settings = parser.parse_args(argv)
    require_at_least(settings, {"every": 1})
    if (settings.run is None) == (not settings.figures):
        raise UserError("report: give --run DIR, or --figures FILE …")
    if settings.figures and (settings.watch or settings.baseline):
        raise UserError("--watch and --baseline go with --run")
    if settings.figures:
        return _figures([Path(name) for name in settings.figures], settings.out)
    root = Path(settings.run)
    if not root.is_dir():
        raise UserError(f"--run {root}: no such folder")
    from erniesearch.report.document import REPORT

    out = Path(settings.out) if settings.out else root / REPORT
    _check(out)
    from erniesearch.evaluation.table import Report, table_console
    from erniesearch.report.watch import folder_document, watch

    if settings.watch:
        watch(root, out, settings.every, settings.baseline)
        return 0
    document = folder_document(root, settings.baseline)
    _save(document, out)
    if (root / "evaluation.json").is_file():
        Report.load(root).show(table_console())
    return 0


def _figures(paths: list[Path], given: str | None) -> int:
    from erniesearch.report.benchmark_report import figures_document

    out = Path(given) if given else paths[0].with_suffix(".html")
    _check(out)
    _save(figures_document(paths), out)
    return 0


def _check(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; give a file")


def _save(document: "Document", out: Path) -> None:
    try:
        document.save(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; give --out") from None
    for note in document.notes:
        say(note, "warning")
    say(f"report: {out}")
