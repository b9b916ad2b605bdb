"""A teacher that no part of a run could load: its scores come in FlagEmbedding's format, scored by
sentence-transformers, and one command trains, exports and evaluates with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.foreign import write_cross_encoder
from support.processes import losses_of, run_python
from support.tiny import ConfigMaker

from erniesearch.cli import main
from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.models.backbone import check_same_vocabulary, load_tokenizer
from erniesearch.pipeline.run import planned
from erniesearch.run_folder import RunFolder

DISTILLED = LossWeights(ce_to_de=1.0, ce_to_li=1.0, margin_mse_de=0.02, margin_mse_li=0.02)


def flagembedding(data: Path, teacher: Path, out: Path) -> Path:
    """Lists with the teacher's scores, as FlagEmbedding has them."""
    library = pytest.importorskip(
        "sentence_transformers", reason="needs sentence-transformers 6 in this environment"
    )
    found = load_beir(data, "train")
    texts = dict(zip(found.pids, found.passages, strict=True))
    model = library.CrossEncoder(str(teacher), device="cpu")
    records: list[dict[str, Any]] = []
    for number, (qid, relevant) in enumerate(found.relevant().items()):
        others = [pid for pid in found.pids if pid not in relevant][number : number + 5]
        record: dict[str, Any] = {"query": found.queries[qid]}
        for key, pids in (("pos", relevant), ("neg", others)):
            record[key] = [texts[pid] for pid in pids]
            pairs = [(record["query"], text) for text in record[key]]
            record[f"{key}_scores"] = model.predict(pairs, show_progress_bar=False).tolist()
        records.append(record)
    out.write_text("".join(json.dumps(record) + "\n" for record in records))
    return out


@pytest.fixture
def config(make_config: ConfigMaker, tiny_data: Path, tmp_path: Path) -> RunConfig:
    teacher = write_cross_encoder(tmp_path / "teacher")
    source = flagembedding(tiny_data, teacher, tmp_path / "train.jsonl")
    out = tmp_path / "data"
    command = ["data", "import", "flagembedding", str(source), "--out", str(out)]
    assert main([*command, "--hold_out", "test=8"]) == 0
    made = make_config(
        steps=60, queries_per_rank=8, num_negatives=4, negatives="given", teacher_scores="stored",
        tau_stored=0.1, weights=DISTILLED, dropout=0.0, num_processes=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="vocabular"):  # no part of this run could load it
        check_same_vocabulary(
            load_tokenizer(made.student), load_tokenizer(replace(made.teacher, path=str(teacher))),
            made.student.path, str(teacher),
        )  # fmt: skip
    off = replace(made.stages, mine=replace(made.stages.mine, enabled=False))
    return replace(made, data=replace(made.data, path=str(out)), stages=off)


@pytest.mark.slow
@pytest.mark.distributed
def test_one_command_trains_from_its_scores(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert planned(config) == ["cascade", "export", "evaluate"]  # nothing here checks the teacher
    status, output = run_python("-m", "erniesearch.cli", "run", str(file))
    assert status == 0, output[-4000:]
    folder = RunFolder(config.run_dir)
    losses = losses_of(folder.stage("cascade"))
    for name in ("ce_to_de", "ce_to_li", "margin_mse_de", "margin_mse_li"):
        first, last = (sum(row[name] for row in part) for part in (losses[:5], losses[-5:]))
        assert last < 0.5 * first, (name, first, last)
    assert not folder.model("cascade", "teacher").exists()
    assert (Path(config.run_dir) / "exports" / "dual_encoder").is_dir()
    rows = json.loads((Path(config.run_dir) / "evaluation.json").read_text())
    assert "dual-encoder, after cascade" in json.dumps(rows)
