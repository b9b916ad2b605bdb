"""Training from Python: loss terms of one's own, callbacks, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SUPPORT, losses_of, run_python
from support.tiny import ConfigMaker

from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.terms import LossTerm, with_terms
from erniesearch.errors import UserError
from erniesearch.run_folder import RunFolder
from erniesearch.stages import Stage
from erniesearch.training.callbacks import Callback
from erniesearch.training.trainer import Trainer

STEPS = 4


def job(config: RunConfig, terms: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {"stage": "cascade", "config": asdict(config), "terms": terms, **more}


def train(root: Path, jobs: list[dict[str, Any]], ranks: int = 1) -> list[Path]:
    """The stages' folders."""
    root.mkdir(exist_ok=True)
    file = root / f"jobs-{len(list(root.iterdir()))}.json"
    file.write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0"] if ranks > 1 else []  # fmt: skip
    status, output = run_python(*launcher, str(SUPPORT / "trainer_worker.py"), str(file))
    assert status == 0, output[-4000:]
    return [RunFolder(each["config"]["run_dir"]).stage(each["stage"]) for each in jobs]


BUILT_IN = LossWeights(li=1.0, de=0.5, ce=2.0, ce_to_li=1.0)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_own_terms_train_as_the_built_in_ones(
    make_config: ConfigMaker, tmp_path: Path, ranks: int
) -> None:
    """Value, gradient (the weights after some updates) and log, plain and by gradient caching;
    also where no built-in term is left, and where another stage of the run has none."""
    jobs = []
    for name, own, weights in (
        ("built-in", (), BUILT_IN),
        ("own", ("de", "ce", "ce_to_li"), LossWeights(li=1.0)),
        ("alone", ("ce",), LossWeights()),
        ("built-in-alone", (), LossWeights(ce=2.0)),
    ):
        for chunk in (None, 3):
            config = make_config(
                run_dir=tmp_path / f"{name}-{chunk}", steps=STEPS, dropout=0.0, weights=weights,
                queries_per_rank=8 // ranks, zero_stage=1, chunk_size=chunk,
            )  # fmt: skip
            jobs.append(job(config, own))
    folders = train(tmp_path / "jobs", jobs, ranks)
    of = {folder.parents[1].name: folder for folder in folders}
    for own, wanted in (("own", "built-in"), ("alone", "built-in-alone")):
        for chunk in ("None", "3"):
            ours, expected = of[f"{own}-{chunk}"], of[f"{wanted}-None"]
            for mine, line in zip(losses_of(ours), losses_of(expected), strict=True):
                names = {"loss": "loss", "own_ce": "ce"}
                if own == "own":
                    names |= {"li": "li", "own_de": "de", "own_ce_to_li": "ce_to_li"}
                for key, name in names.items():
                    assert mine[key] == pytest.approx(line[name], rel=1e-4), (key, mine["step"])
            parts = sorted(path.name for path in (expected / "model").iterdir())
            assert parts == sorted(path.name for path in (ours / "model").iterdir())
            for part in parts:
                made, right = (load_file(f / "model" / part / "model.safetensors")
                               for f in (ours, expected))  # fmt: skip
                for key, tensor in right.items():
                    # These biases shift all logits alike: their gradient is rounding noise.
                    if not key.endswith(("key.bias", "classifier.bias")):
                        torch.testing.assert_close(made[key], tensor, rtol=1e-4, atol=1e-4)
    last = losses_of(of["own-None"])[-1]
    assert last["own_de"] > 0
    assert last["learning_rate"]["teacher"] > 0


def test_own_terms_are_part_of_what_a_stage_is(make_config: ConfigMaker) -> None:
    config = make_config()

    def print_of(*terms: LossTerm) -> str:
        return Stage(with_terms(config, "cascade", terms), "cascade").fingerprint

    one = LossTerm("mine", lambda scores, batch: scores.dual_encoder.mean())
    prints = [print_of(), print_of(one), print_of(LossTerm("mine", one.function, 2.0)),
              print_of(LossTerm("yours", one.function))]  # fmt: skip
    assert len(set(prints)) == 4
    assert print_of(one) == prints[1]
    assert prints[0] == Stage(config, "cascade").fingerprint


def nothing(scores: Any, batch: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: LossTerm("de", nothing), "'de': this name is logged already"),
        (lambda: LossTerm("accuracy_mine", nothing), "logged already"),
        (lambda: LossTerm("my term", nothing), "letters, digits"),
        (lambda: LossTerm("mine", nothing, -1.0), "must be above 0"),
        (lambda: LossTerm("mine", "mean"), "no function"),  # type: ignore[arg-type]
        (lambda: LossTerm("mine", nothing, 1.0, ("dual",)), "did you mean"),  # type: ignore[arg-type]
        (lambda: LossTerm("mine", nothing, trains_teacher=True), "cross_encoder too"),
    ],
)
def test_terms_that_are_refused(made: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made()


def test_what_a_trainer_refuses(make_config: ConfigMaker) -> None:
    config, term = make_config(), LossTerm("mine", nothing)
    for arguments, own, message in (
        ((config, "cascad"), {}, "no training stage 'cascad'.*did you mean.*cascade"),
        ((config, "teacher"), {}, "stages.teacher.steps is 0"),
        ((config, "cascade"), {"terms": [term, term]}, "'mine' is there twice"),
        ((config, "cascade"), {"callbacks": [print]}, "print is no instance"),
        ((config, "cascade"), {"callbacks": [Callback]}, "Callback is no instance"),
        ((make_config(tau_de=0.0), "cascade"), {}, "objective.tau_de"),
        ((make_config(stage="post_train", weights=LossWeights(de=1.0)), "post_train"),
         {"terms": [LossTerm("mine", nothing, 1.0, ("cross_encoder",))]}, "no cross_encoder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Trainer(*arguments, **own)  # type: ignore[arg-type]


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_callbacks_are_told_and_any_rank_may_stop(
    make_config: ConfigMaker, tmp_path: Path, ranks: int
) -> None:
    """The last rank asks: all end after that update, with a checkpoint, a model and done.json."""
    own = {
        "steps": 9, "save_every": 2, "log_every": 2, "validation_split": "dev", "dropout": 0.0,
        "validation_queries": 8, "validation_metrics": ["MRR@10"], "evaluate_every": 3,
        "best_metric": "MRR@10", "weights": LossWeights(de=1.0), "queries_per_rank": 8 // ranks,
    }  # fmt: skip
    events = ("on_step_end", "on_evaluate", "on_log", "on_save")
    jobs = [
        job(make_config(run_dir=tmp_path / f"{event}-{step}", **own),
            stop={"event": event, "step": step, "rank": ranks - 1})
        for event, step in zip(events, (5, 3, 4, 4), strict=True)
    ]  # fmt: skip
    jobs.append(job(make_config(run_dir=tmp_path / "whole", **own)))
    *stopped, whole = train(tmp_path / "jobs", jobs, ranks)
    for folder, event, last in zip(stopped, events, (5, 3, 4, 5), strict=True):
        facts = json.loads((folder / "done.json").read_text())
        assert (facts["steps"], facts["stopped"]) == (last, "Recorder"), event
        assert losses_of(folder) == losses_of(whole)[: last // 2]
        assert (folder / "model" / "student" / "model.safetensors").is_file()
        assert (folder / "checkpoints" / f"step-{last:06d}").is_dir()
    for rank in range(ranks):
        told = json.loads((whole / f"told-{rank}.json").read_text())
        of = {event: [line for line in told if line["event"] == event] for event in
              (*events, "on_train_begin", "on_train_end")}  # fmt: skip
        assert [line["step"] for line in of["on_step_end"]] == list(range(1, 10))
        assert [line["step"] for line in of["on_log"]] == [2, 4, 6, 8, 9]
        assert [line["step"] for line in of["on_evaluate"]] == [2, 3, 4, 6, 8, 9]
        assert {2, 4, 6, 8, 9} <= {line["step"] for line in of["on_save"]}
        assert [line["step"] for line in of["on_train_begin"]] == [0]
        assert [(line["step"], line["model"]) for line in of["on_train_end"]] == [(9, True)]
        logged = [line["loss"] for line in losses_of(whole)]
        assert [line["loss"] for line in of["on_log"]] == logged
        figures = [json.loads(x) for x in (whole / "validation.jsonl").read_text().splitlines()]
        made = [line["evaluation"]["MRR@10_de"] for line in of["on_evaluate"]]
        assert made == [line["MRR@10_de"] for line in figures]
        best = max(made)
        step = of["on_evaluate"][made.index(best)]["step"]
        assert of["on_evaluate"][-1]["best"] == [best, step]


@pytest.mark.distributed
def test_a_stage_goes_on_and_is_done_once(make_config: ConfigMaker, tmp_path: Path) -> None:
    """A killed training goes on with what its callbacks had, and one that is done is left alone."""
    config = make_config(run_dir=tmp_path / "run", steps=5, save_every=2)
    file = tmp_path / "job.json"
    file.write_text(json.dumps([job(config, kill=3)]))
    assert run_python(str(SUPPORT / "trainer_worker.py"), str(file))[0] == 9
    (stage,) = train(tmp_path / "jobs", [job(config)])
    told = json.loads((stage / "told-0.json").read_text())
    assert told[0] == {**told[0], "event": "on_train_begin", "step": 2, "heard": 2}
    assert told[-1]["heard"] == 5
    before = (stage / "done.json").stat().st_mtime_ns
    file.write_text(json.dumps([job(config)]))
    status, output = run_python(str(SUPPORT / "trainer_worker.py"), str(file))
    assert status == 0
    assert "done before" in output
    assert (stage / "done.json").stat().st_mtime_ns == before
    recorded = (Path(config.run_dir) / "config.yaml").read_text()
    assert "steps: 5" in recorded
