"""``mine``: hard negatives from an index."""

from dataclasses import fields

from jsonargparse import ArgumentParser

from erniesearch.commands.parsing import name_accelerator, require_positive
from erniesearch.config.keys import MineConfig
from erniesearch.errors import UserError


def mine_command(argv: list[str]) -> int:
    """``erniesearch mine --model DIR --index DIR --data DIR --out FILE``."""
    parser = ArgumentParser(
        prog="erniesearch mine", exit_on_error=False,
        description="Hard negatives for the queries of a split, in a form that Tevatron reads too,"
        " and statistics in mine.json beside them. Runs on the ranks this process belongs to"
        " (torchrun -m erniesearch.cli mine …, srun, or none for one process); run the same command"
        " again after an interrupt.",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=str, required=True, help="Dual-encoder folder, as in `erniesearch encode`."
    )
    parser.add_argument(
        "--index", type=str, required=True, help="Folder made by `erniesearch index`."
    )
    parser.add_argument(
        "--data", type=str, required=True, help="Folder in BEIR layout, the one indexed."
    )
    parser.add_argument("--out", type=str, required=True, help="File to write, JSON lines.")
    parser.add_argument("--split", type=str, default="train", help="Name of the qrels file.")
    parser.add_argument(
        "--use_titles", type=bool, default=True, help="Put a passage's title before its text."
    )
    parser.add_argument(
        "--teacher", type=str | None, default=None,
        help="Cross-encoder folder that drops candidates it scores too high; none drops nothing.",
    )  # fmt: skip
    parser.add_argument(
        "--write_scores", type=bool, default=False,
        help="Write the teacher's scores of positives and negatives too.",
    )  # fmt: skip
    parser.add_class_arguments(MineConfig, skip={"enabled"})
    parser.add_argument(
        "--nprobe", type=int | None, default=None, help="Lists an IVF search visits."
    )
    parser.add_argument(
        "--ef_search", type=int | None, default=None, help="Breadth of an HNSW search."
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Texts per forward pass.")
    parser.add_argument(
        "--gpu", type=bool, default=False, help="Search on all GPUs (start one process)."
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="Draws max_queries and a random selection."
    )
    options = parser.parse_args(argv).as_dict()
    require_positive(
        options, "depth", "num_negatives", "max_queries", "batch_size", "nprobe", "ef_search"
    )
    keys = [field.name for field in fields(MineConfig) if field.name in options]
    settings = MineConfig(**{name: options.pop(name) for name in keys})
    if not 0 <= settings.skip_top < settings.depth:
        raise UserError(f"--skip_top {settings.skip_top}: from 0 to below --depth {settings.depth}")
    name_accelerator()
    import torch.distributed as dist

    from erniesearch.retrieval.mine_collection import mine_collection

    try:
        mine_collection(settings=settings, **options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
