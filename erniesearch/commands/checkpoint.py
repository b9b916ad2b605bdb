"""``export-checkpoint``: models from a training that has not finished."""

import sys
from pathlib import Path

from erniesearch.commands.parsing import config_parser, name_accelerator, parse_config
from erniesearch.config.checks import with_steps
from erniesearch.config.keys import TRAINING_STAGES
from erniesearch.errors import UserError, nearest
from erniesearch.progress import waiting


def export_checkpoint_command(argv: list[str]) -> int:
    """``erniesearch export-checkpoint --config FILE --stage NAME --out DIR [--best]``."""
    parser = config_parser(
        "export-checkpoint", "Write student and teacher of a stage's newest whole checkpoint as"
        " safetensors folders. Needs no GPU and one process, whatever ZeRO stage and number of"
        " ranks wrote the checkpoint.",
    )  # fmt: skip
    parser.add_argument(
        "--stage", type=str, default="cascade",
        help=f"One of {', '.join(TRAINING_STAGES)}; its checkpoints lie in run_dir.",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=str | None, default=None,
        help="Folder to write: student/ and teacher/ as in stages/NAME/model.",
    )  # fmt: skip
    parser.add_argument(
        "--best", action="store_true",
        help="The best checkpoint by training.best_metric (training.validation_split) instead of"
        " the newest.",
    )  # fmt: skip
    config, settings = parse_config(parser, argv)
    if settings.stage not in TRAINING_STAGES:
        hint = nearest(settings.stage, TRAINING_STAGES)
        raise UserError(f"--stage {settings.stage}: one of {', '.join(TRAINING_STAGES)}{hint}")
    if settings.out is None:
        raise UserError("no --out: name the folder to write")
    name_accelerator()
    from erniesearch.stages import Stage
    from erniesearch.training.checkpoints.weights import export_checkpoint

    stage = Stage(with_steps(config), settings.stage)
    with waiting("reading the checkpoint"):
        step = export_checkpoint(stage, Path(settings.out), settings.best)
    sys.stdout.write(f"{settings.out}: stage {settings.stage} after {step} updates\n")
    return 0
