"""``negatives: given`` trains on the hard negatives that came with the data, checked first."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny import ConfigMaker, write_beir

from erniesearch import stages
from erniesearch.cli import main
from erniesearch.config.checks import validate
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.pipeline.run import planned
from erniesearch.stages import Stage
from erniesearch.training.build import build_sampler, check_inputs


@pytest.fixture
def config(make_config: ConfigMaker, tmp_path: Path) -> RunConfig:
    root = write_beir(tmp_path / "data")
    records = [
        {"query_id": f"q{i}", "negative_document_ids": [f"p{i}", f"p{i + 1}", f"p{i + 2}"]}
        for i in range(30)
    ]
    (root / "negatives.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    made = make_config(stage="cascade", steps=2, negatives="given")
    return replace(made, data=replace(made.data, path=str(root)))


def test_groups_come_from_the_given_file(config: RunConfig) -> None:
    data = load_beir(config.data.path, "train")
    assert validate(config) is config
    check_inputs(config, data)
    sampler = build_sampler(Stage(config, "cascade"), data)
    assert sorted(sampler.qids) == sorted(f"q{i}" for i in range(30))  # those with a line
    for query, qid in enumerate(sampler.qids):
        number = int(qid[1:])
        given = {number, number + 1, number + 2}
        relevant = {data.index_of[pid] for pid in data.qrels[qid]}
        group = sampler.group(0, 0, query)
        assert set(group.passages[1:]) <= given - relevant
        assert group.passages[0] in relevant


def test_no_stage_makes_them(config: RunConfig) -> None:
    off = replace(config.stages, mine=replace(config.stages.mine, enabled=False))
    config = validate(replace(config, stages=off))
    assert planned(config) == ["teacher_check", "cascade", "export", "evaluate"]
    assert stages.upstream(config, "cascade") == []


def test_another_file_makes_the_stage_anew(config: RunConfig) -> None:
    before = stages.fingerprint(config, "cascade", 1)
    assert stages.fingerprint(config, "cascade", 1) == before
    with (Path(config.data.path) / "negatives.jsonl").open("a") as handle:
        handle.write('{"query_id": "q35", "negative_document_ids": ["p1"]}\n')
    assert stages.fingerprint(config, "cascade", 1) != before


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"query_id": "x", "negative_document_ids": []}', ":31: query 'x' is not in queries"),
        ('{"query_id": "q35", "negative_document_ids": ["p1", "x"]}', ":31: passage 'x' is not in"),
        ('{"query_id": "q3", "negative_document_ids": []}', ":31: a second line for query 'q3'"),
        ('{"query_id": "q35", "negatives": []}', ":31: expected query_id and negative_document_"),
        ("{", ":31: not valid JSON"),
    ],
)
def test_odd_line_is_named_before_training(line: str, problem: str, config: RunConfig) -> None:
    path = Path(config.data.path) / "negatives.jsonl"
    with path.open("a") as handle:
        handle.write(line + "\n")
    data = load_beir(config.data.path, "train")
    for check in (lambda: check_inputs(config, data),
                  lambda: build_sampler(Stage(config, "cascade"), data)):  # fmt: skip
        with pytest.raises(UserError) as error:
            check()
        assert str(error.value).startswith(f"{path}{problem}")


def test_missing_or_foreign_file_stops_the_run(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(config.data.path) / "negatives.jsonl"
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    path.unlink()
    assert main(["run", str(file)]) == 2
    assert f"{path}: no such file" in capsys.readouterr().err
    # A file whose queries have no training judgement would train on nothing.
    qrels = Path(config.data.path) / "qrels" / "train.tsv"
    qrels.write_text("q39\tp1\t1\n")
    path.write_text('{"query_id": "q1", "negative_document_ids": ["p3"]}\n')
    assert main(["run", str(file)]) == 2
    assert f"{path}: names no query of the split train" in capsys.readouterr().err
    assert not (Path(config.run_dir) / "stages").exists()
