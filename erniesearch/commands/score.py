"""``score``: a teacher's scores of given lists."""

from erniesearch.commands.parsing import command_parser, name_accelerator, parse_options
from erniesearch.config.options import ScoreOptions


def score_command(argv: list[str]) -> int:
    """``erniesearch score --model MODEL --data DIR --out FILE``."""
    parser = command_parser(
        "score", "Score the lists of a file of hard negatives with any CrossEncoder of"
        " sentence-transformers, for stages with teacher_scores: stored or both. Runs on the ranks"
        " this process belongs to, as mine; run the same command again after an interrupt.",
    )  # fmt: skip
    bounds = {"batch_size": 1, "max_length": 3}
    options, _ = parse_options(parser, argv, ScoreOptions, switches=("overwrite",), at_least=bounds)
    name_accelerator()
    import torch.distributed as dist

    from erniesearch.retrieval.score_lists import score_lists

    try:
        score_lists(options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
