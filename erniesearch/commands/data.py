"""``data …``: make or convert data sets."""

import json
import sys
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from erniesearch.commands.parsing import require_positive
from erniesearch.errors import UserError


def pydocs_command(argv: list[str]) -> int:
    """``erniesearch data pydocs --out DIR``."""
    settings = _embedded(
        "pydocs", "Build a retrieval set from the docstrings on this machine: summary lines are"
        " queries, the rest of each docstring is its passage; split by module.", argv,
    )  # fmt: skip
    from erniesearch.data.importers import pydocs

    facts = pydocs.build(Path(settings.out), settings.max_pairs)
    splits = ", ".join(f"{name} {count}" for name, count in facts["qrels"].items())  # type: ignore[attr-defined]
    sys.stdout.write(
        f"{settings.out}: {facts['passages']} passages, {facts['queries']} queries ({splits})\n"
    )
    return 0


def pycode_command(argv: list[str]) -> int:
    """``erniesearch data pycode --out DIR``."""
    settings = _embedded(
        "pycode", "Build a code-search set from the functions of the standard library and of"
        " installed packages: a docstring's first sentence is the query, the code without"
        " docstrings and comments its passage; split by module.", argv,
    )  # fmt: skip
    from erniesearch.data.importers import pycode

    facts = pycode.build(Path(settings.out), settings.max_pairs)
    splits = ", ".join(f"{name} {count}" for name, count in facts["splits"].items())
    sys.stdout.write(f"{settings.out}: {facts['pairs']} pairs ({splits})\n")
    return 0


def _embedded(name: str, description: str, argv: list[str]) -> Namespace:
    """The options of a set made from what is installed here."""
    parser = ArgumentParser(
        prog=f"erniesearch data {name}", exit_on_error=False, description=description
    )
    parser.add_argument("--out", type=str, required=True, help="Folder to write, BEIR layout.")
    parser.add_argument(
        "--max_pairs", type=int | None, default=None, help="Keep at most this many queries."
    )
    return parser.parse_args(argv)


def import_command(argv: list[str]) -> int:
    """``erniesearch data import FORMAT SOURCE... --out DIR``."""
    parser = ArgumentParser(
        prog="erniesearch data import", exit_on_error=False,
        description="Convert a retrieval set to BEIR layout, with its hard negatives in"
        " negatives.jsonl and a report in import.json. Texts are streamed; the folder is written"
        " whole or not at all.",
    )  # fmt: skip
    parser.add_argument(
        "format", type=str,
        help="beir, msmarco, dpr (also nq), tevatron, flagembedding, dureader, squad (also CMRC"
        " 2018, DRCD, XQuAD, KorQuAD 1.0), parquet (also JSON, CSV and TSV tables), or hf (a"
        " dataset's name).",
    )  # fmt: skip
    parser.add_argument("sources", type=str, nargs="+", help="Files or folders of that format.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write, BEIR layout.")
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace --out if it holds a corpus already."
    )
    parser.add_argument(
        "--skip_bad", type=int, default=0,
        help="Leave out up to this many odd lines and list them in import.json; by default the"
        " first one is an error.",
    )  # fmt: skip
    parser.add_argument(
        "--split", type=str, default="train",
        help="Split of files whose name does not say train, dev or test; of a dataset on the hub,"
        " the split to read.",
    )  # fmt: skip
    parser.add_argument(
        "--hold_out",
        type=str,
        default="",
        help="Queries to move from train to new splits, drawn with --seed: dev=200,test=500.",
    )
    parser.add_argument("--seed", type=int, default=42, help="Draws what is held out.")
    parser.add_argument(
        "--max_negatives", type=int, default=200, help="Hard negatives kept for a query."
    )
    parser.add_argument(
        "--titles", action="store_true",
        help="msmarco: read titles from para.title.txt. Figures with and without do not compare.",
    )  # fmt: skip
    for name, default, what in (
        ("query", "query", "queries"),
        ("positive", "positive", "relevant passages (text or list)"),
        ("negative", "negative", "hard negatives; also NAME_1, NAME_2 and so on"),
        ("query_id", "", "query ids; empty: a hash of the text"),
        ("positive_id", "", "relevant passages' ids; empty: a hash of the text"),
    ):
        parser.add_argument(
            f"--{name}", type=str, default=default, help=f"parquet, hf: column of the {what}."
        )
    parser.add_argument("--subset", type=str, default="", help="hf: configuration of the dataset.")
    _add_squad_options(parser)
    settings = parser.parse_args(argv)
    _check_squad_options(settings)
    if settings.skip_bad < 0 or settings.max_negatives < 0:
        raise UserError("--skip_bad and --max_negatives must be 0 or more")
    held_out = _hold_out(settings.hold_out)
    from erniesearch.data.importers.import_data import convert
    from erniesearch.data.importers.records import Options

    facts = convert(
        settings.format, [Path(source) for source in settings.sources], Path(settings.out),
        Options(**{f.name: getattr(settings, f.name) for f in fields(Options)}),
        skip_bad=settings.skip_bad, max_negatives=settings.max_negatives, hold_out=held_out,
        seed=settings.seed, overwrite=settings.overwrite,
    )  # fmt: skip
    splits = ", ".join(f"{name} {count}" for name, count in facts["judged_queries"].items())
    negatives = facts["queries_with_negatives"]
    sys.stdout.write(
        f"{settings.out}: {facts['passages']} passages, {facts['queries']} queries (judged:"
        f" {splits}; with hard negatives: {negatives})\n"
    )
    for title, kinds in (("left out", facts["left_out"]), ("note", facts["notes"])):
        for kind, found in kinds.items():
            sys.stdout.write(f"{title}: {found['count']} × {kind}, first {found['first'][0]}\n")
    return 0


def _add_squad_options(parser: ArgumentParser) -> None:
    for unit, what in (("words", "words"), ("chars", "characters (Chinese, Japanese)")):
        parser.add_argument(
            f"--max_{unit}", type=int | None, default=None,
            help="squad: cut paragraphs at sentence ends into passages of at most this many"
            f" {what}; a longer sentence stays whole, and a short rest joins the passage before."
            " Questions whose answers no passage holds whole are left out.",
        )  # fmt: skip
    for split in ("dev", "test"):
        parser.add_argument(
            f"--{split}_articles", type=str, default="",
            help=f"squad: split by article; a file with the titles of {split}, one a line, or how"
            " many to draw with --seed.",
        )  # fmt: skip


def _check_squad_options(settings: Namespace) -> None:
    require_positive(vars(settings), "max_words", "max_chars")
    if settings.max_words and settings.max_chars:
        raise UserError("--max_words and --max_chars: give one of them")
    for name in ("max_words", "max_chars", "dev_articles", "test_articles"):
        if settings[name] and settings.format != "squad":
            raise UserError(f"--{name}: format squad alone knows it, not {settings.format}")


def _hold_out(text: str) -> dict[str, int]:
    found = {}
    for part in filter(None, text.split(",")):
        split, _, number = part.partition("=")
        if not split.isidentifier() or not number.isdigit() or int(number) < 1 or split == "train":
            raise UserError(f"--hold_out {text}: expected SPLIT=NUMBER, for example dev=200")
        found[split] = int(number)
    return found


def check_command(argv: list[str]) -> int:
    """``erniesearch data check DIR``."""
    parser = ArgumentParser(
        prog="erniesearch data check", exit_on_error=False,
        description="Read every file of a data set in BEIR layout and print, as JSON, lengths,"
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
