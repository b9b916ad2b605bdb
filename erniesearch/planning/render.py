"""A plan as tables and sentences."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from erniesearch.planning.estimate import MOST_QUERIES
from erniesearch.planning.plan import Machine, StagePlan
from erniesearch.planning.trace import Trace
from erniesearch.planning.trial import Measured


def gib(num_bytes: int) -> str:
    """Bytes in GiB, three digits at least."""
    size = num_bytes / (1 << 30)
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def show(console: Console, plans: list[StagePlan], machine: Machine) -> None:
    """Print every plan as a row, then what to change."""
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title="GiB and milliseconds per rank and update",
    )
    for title in ("stage", "GPUs", "batch", "states", "step", "peak", "fits", "most", "sent",
                  "compute", "send"):  # fmt: skip
        table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
    for plan in plans:
        largest = f"{MOST_QUERIES}+" if plan.largest >= MOST_QUERIES else str(plan.largest)
        table.add_row(
            plan.stage, str(plan.ranks), str(plan.queries), gib(sum(plan.resident.values())),
            gib(max(plan.phases.values())), gib(plan.peak), "yes" if plan.fits else "no",
            largest, gib(sum(plan.sent.values())), f"{1e3 * plan.seconds_computing:.3g}",
            f"{1e3 * plan.seconds_sending:.3g}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "states stay between updates, step comes on top while one is made. batch and most are"
        " queries per rank and micro-step, as planned, as fit; compute and send are milliseconds."
        f" A rank may use {gib(machine.limit())} GiB: {machine.gpu_memory:g} of a GPU less"
        f" {machine.headroom:g} for CUDA, NCCL and the allocator. All texts are counted at their"
        " full length. Times are an estimate:"
        f" {machine.utilization:g} of the peak in matrix products, then"
        f" {machine.node_bandwidth:g} GB/s within a node of {machine.gpus_per_node} and"
        f" {machine.network_bandwidth:g} GB/s between nodes, nothing overlapping.",
        highlight=False,
    )
    for plan in plans:
        where = f"{plan.stage} on {plan.ranks}"
        if plan.continued:
            console.print(f"{where}: continued from smaller traces.", highlight=False)
        for note in plan.notes:
            console.print(f"{where}: {note}.", highlight=False)
        if not plan.fits:
            over = gib(plan.peak - machine.limit())
            console.print(f"{where} does not fit, by {over} GiB. What helps:", highlight=False)
        for change in plan.changes:
            verdict = "fits" if change.fits else "does not fit"
            note = f"; {change.note}" if change.note else ""
            console.print(
                f"  {change.setting}: {gib(change.peak)} GiB, {verdict}{note}", highlight=False
            )


def show_measured(console: Console, rows: list[tuple[str, int, int, Trace, Measured]]) -> None:
    """Planned beside measured: ``(stage, ranks, queries, trace, measured)``."""
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title="GiB of the rank that needs most",
    )
    for title in ("stage", "ranks", "batch", "planned", "measured", "ratio", "before"):
        table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
    for stage, ranks, queries, trace, measured in rows:
        table.add_row(
            stage, str(ranks), str(queries), gib(trace.peak), gib(measured.own),
            f"{trace.peak / measured.own:.2f}", gib(measured.base),
        )  # fmt: skip
    console.print(table)
    console.print(
        "before is what the process held before the model; the other figures come on top."
    )
