"""``evaluate``: models and TREC runs on any data set."""

import os
from pathlib import Path
from typing import Any, Literal, cast

from jsonargparse import ArgumentParser

from erniesearch.commands.parsing import name_accelerator
from erniesearch.errors import UserError

KINDS = ("dual_encoder", "late_interaction", "cross_encoder")


def evaluate_command(argv: list[str]) -> int:
    """``erniesearch evaluate --data DIR --model EXPORT`` or ``--run FILE …``."""
    settings = _parser().parse_args(argv)
    for name in ("depth", "rerank_depth", "batch_size", "max_query_length", "max_passage_length"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    for name, allowed in (("kind", KINDS), ("mean", ("qrels", "run"))):
        value = getattr(settings, name)
        if value is not None and value not in allowed:
            raise UserError(f"--{name} {value}: one of {', '.join(allowed)}")
    for name in ("run_out", "json"):
        if getattr(settings, name) is not None:
            _check_output(f"--{name}", Path(getattr(settings, name)))
    name_accelerator()
    from erniesearch.evaluation.evaluate import Systems, evaluate
    from erniesearch.evaluation.metrics import parse_metrics
    from erniesearch.evaluation.table import table_console

    depth: int = settings.depth
    systems = Systems(
        tuple(settings.run or ()), settings.model, tuple(settings.rerank or ()),
        settings.first_stage, settings.kind, depth, settings.rerank_depth or depth,
        settings.batch_size, settings.max_query_length, settings.max_passage_length,
        settings.bm25_stemmer, settings.bm25_tokenizer, settings.index,
    )  # fmt: skip
    result = evaluate(
        Path(settings.data), settings.split, systems, parse_metrics(settings.metrics),
        cast(Any, settings.mean), settings.seed, settings.use_titles,
        Path(settings.run_out) if settings.run_out else None,
    )  # fmt: skip
    if settings.json:
        result.save(Path(settings.json))
    result.show(table_console())
    return 0


def _check_output(option: str, path: Path) -> None:
    """Whether a file can be written there, before hours of work end without one."""
    if path.is_dir():
        raise UserError(f"{option} {path}: a folder; give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written: the folder is read-only")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="erniesearch evaluate", exit_on_error=False,
        description="Evaluate models (sentence-transformers or PyLate folders, such as those in"
        " exports/) and TREC runs on a set in BEIR layout. With two or more systems, each is"
        " tested against the first.",
    )  # fmt: skip
    add = parser.add_argument
    add("--data", type=str, required=True,
        help="Folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.")  # fmt: skip
    add("--split", type=str, default="test", help="Name of the qrels file, without .tsv.")
    add("--use_titles", type=bool, default=True,
        help="Put a passage's title before its text; figures with and without do not"
        " compare.")  # fmt: skip
    add("--run", action="extend", nargs="+", type=str,
        help="TREC run files to evaluate; may be given several times.")  # fmt: skip
    add("--model", type=str | None, default=None,
        help="Model folder. A dual-encoder searches the corpus exhaustively; late interaction and"
        " cross-encoder rerank --first_stage.")  # fmt: skip
    add("--kind", type=str | None, default=None,
        help=f"What --model is: {', '.join(KINDS)}; read off the folder by default. A stage's"
        " student is two of them.")  # fmt: skip
    add("--first_stage", type=str, default="bm25",
        help="What a reranking --model reranks: bm25, a TREC run file or a dual-encoder's"
        " folder.")  # fmt: skip
    add("--index", type=str | None, default=None,
        help="Folder of `erniesearch index` over this corpus by the same dual-encoder: it is"
        " searched, and the corpus is not encoded.")  # fmt: skip
    add("--rerank", action="extend", nargs="+", type=str,
        help="Folders of late-interaction models and cross-encoders; each reranks the run that"
        " --model makes or reranks.")  # fmt: skip
    add("--depth", type=int, default=100, help="Passages retrieved per query.")
    add("--rerank_depth", type=int | None, default=None,
        help="Passages reranked per query; those below keep their order. --depth by"
        " default.")  # fmt: skip
    add("--metrics", type=str, default="MRR@10,nDCG@10,R@10,R@100",
        help="Names separated by commas: MRR, nDCG, R (recall), success, P, each as NAME@K; MAP;"
        " A@K (an answer string from queries.jsonl's metadata.answers is in one of the top K"
        " passages); other names as in ir-measures.")  # fmt: skip
    add("--mean", type=str, default="qrels",
        help="qrels: over all queries of the qrels, those without results as 0 (MS MARCO); run:"
        " over those with results in every run (trec_eval without -c).")  # fmt: skip
    add("--run_out", type=str | None, default=None,
        help="File for the run of the table's last row, in TREC's format.")  # fmt: skip
    add("--json", type=str | None, default=None, help="File for the figures, in JSON.")
    add("--seed", type=int, default=42, help="Of the bootstrap and the randomisation test.")
    add("--batch_size", type=int, default=32, help="Texts per forward pass.")
    for side in ("query", "passage"):
        add(f"--max_{side}_length", type=int | None, default=None,
            help=f"Longest {side} in tokens; the folder's own by default.")  # fmt: skip
    add("--bm25_stemmer", type=str | None, default="english",
        help="Snowball stemmer of BM25, or null for none.")  # fmt: skip
    add("--bm25_tokenizer", type=Literal["words", "code", "jieba"], default="words",
        help="How BM25 splits text, as in evaluation.bm25_tokenizer.")  # fmt: skip
    return parser
