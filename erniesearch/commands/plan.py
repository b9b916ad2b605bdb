"""``plan``: memory, traffic and time of a training before it is started."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from erniesearch.commands.parsing import config_parser, name_accelerator, parse_config
from erniesearch.config.checks import with_steps
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.errors import UserError, nearest
from erniesearch.files import write_atomically


def plan_command(argv: list[str]) -> int:
    """``erniesearch plan CONFIG --gpus N --gpu-memory G``."""
    name_accelerator()
    from erniesearch.planning.plan import Machine

    argv = [_underscored(argument) for argument in argv]
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    parser = config_parser(
        "plan", "Memory per rank, bytes on the wire and time of every training stage, the largest"
        " batch that fits, and what to change where it does not. Neither data nor weights nor a GPU"
        " are needed: the model runs on tensors without contents.",
    )  # fmt: skip
    parser.add_argument(
        "--gpus", type=str, default="1",
        help="Ranks: a number, several with commas, or all for 1, 2, 4, … 1024.",
    )  # fmt: skip
    parser.add_argument("--stage", type=str | None, default=None, help="Plan this stage alone.")
    parser.add_argument("--json", type=str | None, default=None, help="Write everything here too.")
    parser.add_argument(
        "--measure", action="store_true",
        help="Train a few updates of each stage on this machine, with random weights and as many"
        " ranks as --gpus says, and show the peak beside the planned one.",
    )  # fmt: skip
    parser.add_class_arguments(Machine)
    config, settings = parse_config(parser, argv)
    config = with_steps(config)  # an update's memory and time do not depend on how many there are
    machine = Machine(**{field.name: settings[field.name] for field in fields(Machine)})
    for field in fields(Machine):
        value = settings[field.name]
        if value is not None and value <= 0 and field.name != "headroom":
            raise UserError(f"--{field.name} {value}: must be above 0")
    if not 0 <= machine.headroom < machine.gpu_memory:
        raise UserError(
            f"--headroom {machine.headroom:g}: must be at least 0 and below --gpu_memory"
            f" {machine.gpu_memory:g}"
        )
    ranks, names = _ranks(settings.gpus), _stages(config, settings.stage)
    if settings.measure and len(ranks) > 1:
        raise UserError(f"--gpus {settings.gpus}: --measure takes one number of ranks")
    run = _measure if settings.measure else _plan
    results = run(config, machine, ranks, names)
    if settings.json:
        content = {"machine": asdict(machine), "stages": results}
        try:
            write_atomically(Path(settings.json), json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {settings.json}: {error.strerror}") from None
    return 0


def _plan(
    config: RunConfig, machine: Any, ranks: list[int], names: list[str]
) -> list[dict[str, Any]]:
    from rich.console import Console

    from erniesearch.planning.plan import Planner
    from erniesearch.planning.render import show

    planner = Planner(config, machine)
    plans = planner.all(names, ranks)
    console = Console()
    show(console, plans, machine)
    for name in names:
        planned = {plan.ranks for plan in plans if plan.stage == name}
        if left_out := [str(number) for number in ranks if number not in planned]:
            console.print(
                f"{name}: {', '.join(left_out)} ranks cannot share stages.{name}.batch_size"
                " equally.",
                highlight=False,
            )
    return [asdict(plan) for plan in plans]


def _measure(
    config: RunConfig, machine: Any, ranks: list[int], names: list[str]
) -> list[dict[str, Any]]:
    import torch
    from rich.console import Console

    from erniesearch.planning.plan import Planner
    from erniesearch.planning.render import show_measured
    from erniesearch.planning.trial import measure
    from erniesearch.stages import Stage

    planner = Planner(config, machine, "cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in names:
        stage = Stage(config, name, ranks[0])
        queries = stage.queries_per_rank
        trace = planner.estimator(name)(stage.ranks, queries)
        rows.append((name, stage.ranks, queries, trace, measure(stage, queries)))
    show_measured(Console(), rows)
    return [
        {"stage": name, "ranks": number, "queries": queries, "planned": asdict(trace),
         "planned_peak": trace.peak, "measured": asdict(measured), "measured_own": measured.own}
        for name, number, queries, trace, measured in rows
    ]  # fmt: skip


def _underscored(argument: str) -> str:
    """``--gpu-memory`` as ``--gpu_memory``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _ranks(given: str) -> list[int]:
    if given == "all":
        return [1 << power for power in range(11)]
    try:
        ranks = [int(part) for part in given.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1 or max(ranks) > 65536:
        raise UserError(f"--gpus {given}: a number from 1 to 65536, several with commas, or all")
    return ranks


def _stages(config: RunConfig, wanted: str | None) -> list[str]:
    from erniesearch.stages import is_enabled

    if wanted is not None and wanted not in TRAINING_STAGES:
        hint = nearest(wanted, TRAINING_STAGES)
        raise UserError(f"--stage {wanted}: one of {', '.join(TRAINING_STAGES)}{hint}")
    names = [name for name in TRAINING_STAGES if is_enabled(config, name)]
    if wanted is not None and wanted not in names:
        raise UserError(f"--stage {wanted}: left out of the run, stages.{wanted}.steps is 0")
    if not names:
        raise UserError("the run has no training stage: every stages.NAME.steps is 0")
    return [wanted] if wanted else names
