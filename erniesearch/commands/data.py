"""``data …``: make or convert data sets."""

import json
import sys
from importlib import import_module
from pathlib import Path

from erniesearch.commands.parsing import command_parser, parse_options
from erniesearch.config.options import ImportOptions
from erniesearch.errors import UserError


def pydocs_command(argv: list[str]) -> int:
    """``erniesearch data pydocs --out DIR``."""
    return _embedded(
        "pydocs", "Build a retrieval set from the docstrings on this machine: summary lines are"
        " queries, the rest of each docstring is its passage; split by module.", argv,
    )  # fmt: skip


def pycode_command(argv: list[str]) -> int:
    """``erniesearch data pycode --out DIR``."""
    return _embedded(
        "pycode", "Build a code-search set from the functions of the standard library and of"
        " installed packages: a docstring's first sentence is the query, the code without"
        " docstrings and comments its passage; split by module.", argv,
    )  # fmt: skip


def _embedded(name: str, description: str, argv: list[str]) -> int:
    """A set made from what is installed here."""
    parser = command_parser(f"data {name}", description)
    parser.add_argument("--out", type=str, required=True, help="Folder to write, BEIR layout.")
    parser.add_argument(
        "--max_pairs", type=int | None, default=None, help="Keep at most this many queries."
    )
    settings = parser.parse_args(argv)
    build = import_module(f"erniesearch.data.importers.{name}").build
    splits = build(Path(settings.out), settings.max_pairs)["splits"]
    told = ", ".join(f"{split} {count}" for split, count in splits.items())
    sys.stdout.write(f"{settings.out}: {sum(splits.values())} queries ({told})\n")
    return 0


def import_command(argv: list[str]) -> int:
    """``erniesearch data import FORMAT SOURCE... --out DIR``."""
    parser = command_parser(
        "data import", "Convert a retrieval set to BEIR layout, with its hard negatives in"
        " negatives.jsonl and a report in import.json. Texts are streamed; the folder is written"
        " whole or not at all.",
    )  # fmt: skip
    parser.add_argument(
        "format", type=str,
        help="beir, msmarco, dpr (also nq), tevatron, flagembedding, pylate, dureader, squad (also"
        " CMRC 2018, DRCD, XQuAD, KorQuAD 1.0), parquet (also JSON, CSV and TSV tables), or hf (a"
        " dataset's name).",
    )  # fmt: skip
    parser.add_argument("sources", type=str, nargs="+", help="Files or folders of that format.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write, BEIR layout.")
    options, found = parse_options(
        parser, argv, ImportOptions, switches=("overwrite", "titles"),
        at_least={"skip_bad": 0, "max_negatives": 0, "max_words": 1, "max_chars": 1},
    )  # fmt: skip
    if options.max_words and options.max_chars:
        raise UserError("--max_words and --max_chars: give one of them")
    for name in ("max_words", "max_chars", "dev_articles", "test_articles"):
        if getattr(options, name) and found.format != "squad":
            raise UserError(f"--{name}: format squad alone knows it, not {found.format}")
    if options.relevant and found.format != "pylate":
        raise UserError(f"--relevant: format pylate alone knows it, not {found.format}")
    from erniesearch.data.importers.import_data import convert

    sources, out = [Path(source) for source in found.sources], Path(found.out)
    facts = convert(found.format, sources, out, options)
    splits = ", ".join(f"{name} {count}" for name, count in facts["judged_queries"].items())
    negatives, scored = facts["queries_with_negatives"], facts["queries_with_scores"]
    told = f", {scored} of them with a teacher's scores" if scored else ""
    sys.stdout.write(
        f"{out}: {facts['passages']} passages, {facts['queries']} queries (judged:"
        f" {splits}; with hard negatives: {negatives}{told})\n"
    )
    for title, kinds in (("left out", facts["left_out"]), ("note", facts["notes"])):
        for kind, told in kinds.items():
            sys.stdout.write(f"{title}: {told['count']} × {kind}, first {told['first'][0]}\n")
    return 0


def check_command(argv: list[str]) -> int:
    """``erniesearch data check DIR``."""
    parser = command_parser(
        "data check", "Read every file of a data set in BEIR layout and print, as JSON, lengths,"
        " passages with one text, judgements by split, and queries that splits share.",
    )  # fmt: skip
    parser.add_argument("data", type=str, help="Folder in BEIR layout.")
    parser.add_argument(
        "--model", type=str, default="",
        help="Count tokens with this model's tokenizer (as in student.path).",
    )  # fmt: skip
    parser.add_argument(
        "--use_titles", type=bool, default=True, help="Count a passage's title as its text."
    )
    settings = parser.parse_args(argv)
    from erniesearch.config.keys import StudentConfig
    from erniesearch.data.check import check
    from erniesearch.models.backbone import load_tokenizer

    tokenizer = load_tokenizer(StudentConfig(settings.model)) if settings.model else None
    facts = check(Path(settings.data), settings.use_titles, tokenizer)
    sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    return 0
