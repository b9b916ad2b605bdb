"""Data that a program holds reaches every step, those that read files too: BM25, mining, the
cascade on what was mined, export, evaluation."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from support.processes import SUPPORT, run_python
from support.progress_lines import read_progress
from support.tiny import ConfigMaker

from erniesearch.config.stage_keys import MineConfig, TeacherCheckConfig


def test_every_step_of_a_run(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config("cascade", negatives="mined", steps=2, queries_per_rank=4)
    interaction = make_config("interaction", negatives="bm25", steps=2, dropout=0.1)
    chosen = replace(
        config.stages, interaction=interaction.stages.interaction,
        mine=MineConfig(depth=10, num_negatives=4, denoise_margin=None),
        teacher_check=TeacherCheckConfig(enabled=False),
    )  # fmt: skip
    config = replace(config, stages=chosen, student=interaction.student)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    status, output = run_python(
        str(SUPPORT / "in_memory_worker.py"), str(tmp_path / "config.json"),
        ERNIESEARCH_PROGRESS="json",
    )  # fmt: skip
    assert status == 0, output[-3000:]
    told = read_progress(output, others=True)
    trained = {line["stage"]: line["done"] for line in told if line.get("what") == "training"}
    assert trained == {"interaction": 2, "cascade": 2}
    mined = [line["done"] for line in told if line.get("what") == "mining"]
    assert (mined[0], mined[-1]) == (0, 20)
    assert {"mine", "evaluate"} <= {line["stage"] for line in told if "message" in line}
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert steps == ["bm25", "interaction", "mine", "cascade", "export", "evaluate"]
    summary = (Path(config.run_dir) / "summary.md").read_text()
    assert "in-memory, test: 5 queries, 40 passages" in summary
