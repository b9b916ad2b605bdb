"""``run``, ``train`` and ``step``: a whole pipeline, one training stage, one other step."""

import os
from typing import Literal

from erniesearch.commands.parsing import config_parser, name_accelerator, parse_config
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.errors import UserError, nearest
from erniesearch.progress import say
from erniesearch.training.faults import preemption


def run_command(argv: list[str]) -> int:
    """``erniesearch run CONFIG``."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    parser = config_parser(
        "run", "Run every stage of a config, several ranks through the DeepSpeed launcher; finished"
        " stages are skipped, an interrupted one continues.",
    )  # fmt: skip
    parser.add_argument(
        "--only", type=str | None, default=None,
        help="Comma-separated steps to run, e.g. mine,cascade; all by default.",
    )  # fmt: skip
    config, settings = parse_config(parser, argv)
    name_accelerator()
    from erniesearch.pipeline import launcher
    from erniesearch.pipeline.run import run_pipeline
    from erniesearch.training.faults.process import exit_with_pipeline

    exit_with_pipeline()  # an ablation may have started this one
    launch = _do_here if os.environ.get(launcher.ONE_PROCESS) else launcher.launch
    try:
        with preemption.listening(launcher.stop):
            run_pipeline(config, settings.only.split(",") if settings.only else None, launch)
    except preemption.Preempted as stop:
        return _stopped(stop)
    except launcher.StageFailed as error:
        if error.status != 2:  # a user's mistake has been told already
            say(f"{error}; run the same command again to continue", "stopped")
        return 2 if error.status == 2 else 1
    return 0


def train_command(argv: list[str]) -> int:
    """``deepspeed launch/train.py --config … --stage …``."""
    parser = config_parser(
        "train", "Train one stage on the ranks this process belongs to (deepspeed, torchrun, srun,"
        " or none for one process).",
    )  # fmt: skip
    parser.add_argument(
        "--stage", type=str, default="interaction",
        help=f"One of {', '.join(TRAINING_STAGES)}. Stages that start from another's result need"
        " it in run_dir.",
    )  # fmt: skip
    config, settings = parse_config(parser, argv)
    if settings.stage not in TRAINING_STAGES:
        hint = nearest(settings.stage, TRAINING_STAGES)
        raise UserError(f"--stage {settings.stage}: one of {', '.join(TRAINING_STAGES)}{hint}")
    name_accelerator()
    try:
        _train(config, settings.stage)
    except preemption.Preempted as stop:
        return _stopped(stop)
    return 0


def step_command(argv: list[str]) -> int:
    """``erniesearch step --config … --name … --world_size …``, which ``run`` starts."""
    parser = config_parser(
        "step", "Do one step other than training in this process. `erniesearch run` starts it, and"
        " holds the run's folder meanwhile.",
    )  # fmt: skip
    parser.add_argument(
        "--name", required=True, help="What is done.",
        type=Literal["bm25", "teacher_check", "mine", "export", "evaluate"],
    )  # fmt: skip
    parser.add_argument(
        "--world_size", type=int, required=True, help="Ranks of the run's training stages."
    )
    config, settings = parse_config(parser, argv)
    try:
        _do_step(config, settings.name, settings.world_size)
    except preemption.Preempted:
        return preemption.EXIT_STATUS  # the pipeline tells
    return 0


def _train(config: RunConfig, stage: str) -> None:
    with preemption.listening():  # before the slow imports
        import torch.distributed as dist

        from erniesearch.training.trainer import Trainer

        try:
            Trainer(config, stage).train()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _do_step(config: RunConfig, name: str, world_size: int) -> None:
    def stop() -> None:
        raise preemption.Preempted("stopped between two steps")

    with preemption.listening(stop):  # before the slow imports
        from erniesearch.pipeline.steps import run_step

        run_step(config, name, world_size)


def _do_here(config: RunConfig, name: str, world_size: int) -> None:
    """A step in this process if it has one rank."""
    from erniesearch.pipeline import launcher

    if world_size > 1 or launcher.in_slurm_job():
        launcher.launch(config, name, world_size)
    elif name in TRAINING_STAGES:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _train(config, name)
    else:
        _do_step(config, name, world_size)


def _stopped(stop: preemption.Preempted) -> int:
    say(f"{stop}; run the same command again to continue", "stopped")
    return preemption.EXIT_STATUS
