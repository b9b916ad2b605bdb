"""``ablate``: the arms of a grid, trained once each and compared."""

import os
import re
import shlex
import sys

from jsonargparse import ArgumentParser

from erniesearch.commands.parsing import command_parser, name_accelerator, require_at_least
from erniesearch.errors import UserError
from erniesearch.progress import VARIABLE, mode, say
from erniesearch.training.faults import preemption


def ablate_command(argv: list[str]) -> int:
    """``erniesearch ablate GRID``."""
    settings = _parser().parse_args(argv)
    require_at_least(settings, {"jobs": 1, "tasks": 1})
    if (settings.task is None) != (settings.tasks is None):
        raise UserError(
            "--task and --tasks go together: this task's number, and how many there are"
        )
    if settings.task is not None and not 0 <= settings.task < settings.tasks:
        raise UserError(f"--task {settings.task}: must be 0 to {settings.tasks - 1}")
    name_accelerator()
    from erniesearch import installation
    from erniesearch.ablation import arms
    from erniesearch.ablation.grid import read_grid

    given = {key: getattr(settings, key) for key in ("config", "run_dir", "split")}
    if settings.seeds is not None:
        if not re.fullmatch(r"\d+(,\d+)*", settings.seeds):
            raise UserError(f"--seeds {settings.seeds}: must be integers separated by commas")
        given["seeds"] = [int(seed) for seed in settings.seeds.split(",")]
    grid = read_grid(installation.grid_file(settings.grid), given)
    if settings.arms:
        grid = grid.only(settings.arms.split(","))
    jobs = list(grid.jobs())
    if settings.task is not None:
        jobs = jobs[settings.task :: settings.tasks]
    if settings.jobs > 1 and mode() == "auto":  # they would rewrite one another's lines
        os.environ[VARIABLE] = "plain"
    try:
        with preemption.listening(arms.stop):
            if not settings.report:
                arms.train_arms(grid, jobs, settings.jobs)
    except preemption.Preempted as stopped:
        say(f"{stopped}; run the same command again to continue", "stopped")
        return preemption.EXIT_STATUS
    except arms.ArmFailed as error:
        if error.status != 2:
            say(f"{error}; run the same command again to continue", "stopped")
        return 2 if error.status == 2 else 1
    missing = arms.pending(grid, grid.jobs())
    if missing and settings.report:
        raise UserError(f"{grid.run_dir}: not done yet: {', '.join(missing)}")
    if missing:
        say(f"the table waits for {', '.join(missing)}")
        return 0
    command = shlex.join(["erniesearch", "ablate", *argv])
    from erniesearch.ablation.plots import plot_curves, plot_differences
    from erniesearch.ablation.results import collect
    from erniesearch.report.watch import write_report

    results = collect(grid, command)
    results.save(grid.run_dir / f"results-{grid.split}.json")
    plot_differences(results, grid.run_dir / f"differences-{grid.split}.png")
    plot_curves(grid, grid.run_dir / "curves.png")
    table = results.markdown()
    (grid.run_dir / f"results-{grid.split}.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)
    if written := write_report(grid.run_dir):
        say(f"report: {written}")
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser(
        "ablate", "Train every arm of a grid with every seed, measure each arm's last"
        " dual-encoder, and compare it with its control on the same queries. Stages that arms share"
        " are trained once; the same command continues after an interruption.",
    )  # fmt: skip
    add = parser.add_argument
    add("grid", type=str, help="YAML file of the grid, or the name of a shipped one.")
    add("--config", type=str | None, default=None,
        help="Configuration of the arms, instead of the one that the grid names; give --run_dir"
        " with it.")  # fmt: skip
    add(
        "--run_dir", type=str | None, default=None, help="Folder of results; the grid's by default."
    )
    add("--split", type=str | None, default=None,
        help="Qrels to measure on, e.g. dev while tuning; the grid's by default. Nothing is trained"
        " again for another split.")  # fmt: skip
    add(
        "--arms",
        type=str | None,
        default=None,
        help="Only these and their controls, separated by commas.",
    )
    add("--seeds", type=str | None, default=None,
        help="Instead of the grid's, separated by commas; arms that name their own keep"
        " them.")  # fmt: skip
    add("--jobs", type=int, default=1,
        help="Arms trained at the same time on this machine; each takes training.num_processes"
        " processes.")  # fmt: skip
    add("--task", type=int | None, default=None,
        help="Do every --tasks-th job from this one on, from 0 (Slurm arrays).")  # fmt: skip
    add("--tasks", type=int | None, default=None, help="How many tasks share the work.")
    add("--report", type=bool, default=False,
        help="true: train nothing, make the table from what is there.")  # fmt: skip
    return parser
