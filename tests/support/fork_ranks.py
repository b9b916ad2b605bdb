"""Started by tests: trains on any number of ranks, kills ranks, starts again.

Usage: fork_ranks.py JOB.json, with one of
    {"plan": [[config, ranks, until], …]}   train each config; until: kill all ranks once the
                                            checkpoint of that update is there; null: to the end
    {"whole": config, "killed": config, "kills": n, "seed": n, …}   kill at random moments
Prints one JSON line of figures. The ranks are forked from this process, which has imported
everything already: a start costs a second, not ten.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from support.unvalidated import train as train_stage

from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.distributed import free_port
from erniesearch.errors import RankFailed
from erniesearch.run_folder import RunFolder

PATIENCE = 240  # seconds for anything on a machine under load


def fork_rank(config: dict[str, Any], rank: int, port: int, log: Path, ranks: int = 2) -> int:
    """A training process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    status = 1
    try:
        train_stage(from_dict(RunConfig, config), "cascade")
        status = 0
    except RankFailed:
        status = 3  # a rank that noticed the other's death
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def ended(pid: int, seconds: float) -> int | None:
    """Exit status (negative: the signal), or None if it is still there after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def run_to_end(config: dict[str, Any], log: Path, ranks: int = 2) -> None:
    """All ranks, without a kill."""
    port = free_port()
    for pid in [fork_rank(config, rank, port, log, ranks) for rank in range(ranks)]:
        status = ended(pid, PATIENCE)
        assert status == 0, f"status {status}: {log.read_text()[-3000:]}"


def run_until(config: dict[str, Any], log: Path, ranks: int, step: int) -> None:
    """All ranks, killed once the checkpoint of an update is there."""
    port = free_port()
    wanted = RunFolder(config["run_dir"]).stage("cascade") / f"checkpoints/step-{step:06d}"
    pids = [fork_rank(config, rank, port, log, ranks) for rank in range(ranks)]
    deadline = time.monotonic() + PATIENCE
    while not wanted.exists():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [ended(pid, PATIENCE) for pid in pids] == [-9] * ranks


def lines_in(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.exists() else 0


def kill_at_random(job: dict[str, Any], log: Path) -> dict[str, Any]:
    rng = random.Random(job["seed"])
    run_to_end(job["whole"], log)
    stage = RunFolder(job["killed"]["run_dir"]).stage("cascade")
    victims: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    starts = 0
    while sum(victims.values()) < job["kills"] and not (stage / "done.json").exists():
        starts += 1
        port = free_port()
        pids = [fork_rank(job["killed"], rank, port, log) for rank in (0, 1)]
        # A third of the kills at any moment of the start; the others after some updates and a
        # fraction of the time that an update and a checkpoint take.
        if starts % 3 == 0:
            moments["start"] += 1
            time.sleep(rng.uniform(0, job["start_seconds"]))
        else:
            moments["updates"] += 1
            wanted = lines_in(stage / "metrics.jsonl") + rng.randint(1, 3)
            deadline = time.monotonic() + PATIENCE
            while lines_in(stage / "metrics.jsonl") < wanted:
                if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.001)
            time.sleep(rng.uniform(0, job["update_seconds"]))
        killed = rng.choice([[0, 1], [0], [1]])
        for rank in killed:
            os.kill(pids[rank], signal.SIGKILL)
        statuses = [ended(pid, PATIENCE) for pid in pids]
        assert None not in statuses, (
            f"rank {statuses.index(None)} outlived the other: kill {starts}"
        )
        if statuses == [0, 0]:
            break
        assert set(statuses) <= {-9, 3, 0}, f"{statuses}: {log.read_text()[-3000:]}"
        if -9 in statuses:
            victims["both" if len(killed) == 2 else f"rank {killed[0]}"] += 1
    run_to_end(job["killed"], log)
    resumed = log.read_text().count("is damaged")
    return {"kills": sum(victims.values()), "starts": starts + 1, "victims": victims,
            "moments": moments, "damaged": resumed}  # fmt: skip


def follow(plan: list[tuple[dict[str, Any], int, int | None]], log: Path) -> dict[str, Any]:
    for config, ranks, until in plan:
        if until is None:
            run_to_end(config, log, ranks)
        else:
            run_until(config, log, ranks, until)
    return {"starts": len(plan)}


if __name__ == "__main__":
    file = Path(sys.argv[1])
    job, log = json.loads(file.read_text()), file.with_suffix(".log")
    result = follow(job["plan"], log) if "plan" in job else kill_at_random(job, log)
    sys.stdout.write(json.dumps(result) + "\n")
