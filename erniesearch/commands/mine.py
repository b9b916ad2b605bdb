"""``mine``: hard negatives from an index."""

from dataclasses import fields

from erniesearch.commands.parsing import command_parser, name_accelerator, parse_options
from erniesearch.config.options import MineOptions
from erniesearch.config.stage_keys import MineConfig
from erniesearch.errors import UserError


def mine_command(argv: list[str]) -> int:
    """``erniesearch mine --model DIR --index DIR --data DIR --out FILE``."""
    parser = command_parser(
        "mine", "Hard negatives for the queries of a split, in a form that Tevatron reads too,"
        " and statistics in mine.json beside them. Runs on the ranks this process belongs to"
        " (torchrun -m erniesearch.cli mine …, srun, or none for one process); run the same command"
        " again after an interrupt.",
    )  # fmt: skip
    parser.add_class_arguments(MineConfig, skip={"enabled"})
    names = ("depth", "num_negatives", "max_queries", "batch_size", "nprobe", "ef_search",
             "candidates", "dim")  # fmt: skip
    options, found = parse_options(parser, argv, MineOptions, at_least=dict.fromkeys(names, 1))
    keys = [field.name for field in fields(MineConfig) if field.name in found]
    settings = MineConfig(**{name: found[name] for name in keys})
    if not 0 <= settings.skip_top < settings.depth:
        raise UserError(f"--skip_top {settings.skip_top}: from 0 to below --depth {settings.depth}")
    if settings.denoise_relative_margin is not None and settings.denoise_relative_margin < 0:
        raise UserError(f"--denoise_relative_margin {settings.denoise_relative_margin}: 0 or more")
    name_accelerator()
    import torch.distributed as dist

    from erniesearch.retrieval.mine_collection import mine_collection

    try:
        mine_collection(options, settings)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
