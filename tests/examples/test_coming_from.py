"""One small training by PyLate, by sentence-transformers and here: each runs, ours is no longer
than theirs, and docs/coming-from.md shows what ran.

A peer is looked for beside this project's packages, and in the folder that ERNIESEARCH_PEERS names
(tests/export/test_peers.py makes it)."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from support.processes import ROOT
from support.tiny import WORDS, write_model
from transformers import TrainingArguments

import erniesearch
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.config.stage_keys import StageConfig
from erniesearch.config.yaml_file import types_of

SCRIPTS = ROOT / "examples" / "peers"
OURS = "erniesearch_late_interaction"
THEIRS = {"pylate_colbert": ("pylate", "1.6"),
          "sentence_transformers_multi_vector": ("sentence_transformers", "6.2")}  # fmt: skip
PAGES = ("docs/coming-from.md", "docs/coming-from.zh-CN.md")


def body(name: str) -> str:
    """A script without its docstring."""
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    end = ast.parse(text).body[0].end_lineno
    return "\n".join(text.splitlines()[end:]).strip()


def lines_of_code(name: str) -> int:
    lines = map(str.strip, body(name).splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def interpreter(package: str, release: str) -> str:
    """A Python that imports this release of a peer."""
    folder = os.environ.get("ERNIESEARCH_PEERS")
    kept = (
        Path(folder).glob(f"{package.replace('_', '-')}-{release}-*/bin/python") if folder else ()
    )
    ask = f"from importlib.metadata import version; print(version('{package}'))"
    for python in (*map(str, kept), sys.executable):
        if python == sys.executable and not importlib.util.find_spec(package):
            continue
        found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
        if found.stdout.startswith(f"{release}."):
            return python
    pytest.skip(f"{package} {release} is not installed (extra peers, or ERNIESEARCH_PEERS)")


def train(python: str, name: str, folder: Path) -> list[float]:
    """Run a script on ten triplets with a tiny model; the scores that it prints last."""
    model = write_model(folder / "model", max_position_embeddings=192)
    rows = [{"query": WORDS[i], "positive": f"{WORDS[i]} {WORDS[i + 9]}", "negative": WORDS[i + 30]}
            for i in range(10)]  # fmt: skip
    (folder / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "WANDB_MODE": "disabled", "HF_HOME": str(folder / "hf")}  # fmt: skip
    if python == sys.executable:
        path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        own["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | own
    result = subprocess.run(
        [python, str(SCRIPTS / f"{name}.py"), str(model), str(folder / "triplets.jsonl"),
         str(folder / "out")],
        capture_output=True, text=True, check=False, env=environment, timeout=900, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    scores = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(scores) == 2
    assert scores[0] > scores[1]  # the positive has the query's word in it
    return scores


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", THEIRS)
def test_a_peers_script(name: str, tmp_path: Path) -> None:
    train(interpreter(*THEIRS[name]), name, tmp_path)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_our_script(tmp_path: Path) -> None:
    train(sys.executable, OURS, tmp_path)
    for kind in ("dual_encoder", "late_interaction"):
        assert (tmp_path / "out" / "exports" / kind / "model.safetensors").is_file()


def test_ours_is_no_longer() -> None:
    assert lines_of_code(OURS) <= min(map(lines_of_code, THEIRS))


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_what_runs(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in (OURS, *THEIRS):
        assert body(name) in text, name
        assert f"{lines_of_code(name)}" in text


def keys_of(cls: type, prefix: str = "") -> set[str]:
    found = set()
    for name, kind in types_of(cls).items():
        found |= keys_of(kind, f"{prefix}{name}.") if is_dataclass(kind) else {prefix + name}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_both_sides_of_the_table_exist(page: str) -> None:
    sections = (ROOT / page).read_text(encoding="utf-8").split("\n## ")
    (text,) = [section for section in sections if "| `output_dir` |" in section]
    tables = [table.splitlines() for table in text.split("\n\n") if table.startswith("| ")]
    arguments = {field.name for field in fields(TrainingArguments)}
    for line in tables[0][2:-1]:
        theirs, _ = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("| ").split(" | "))
        assert set(theirs) <= arguments | {"EarlyStoppingCallback", "mini_batch_size"}, line
    stage = keys_of(StageConfig)
    ours = keys_of(RunConfig) | stage | {f"stages.NAME.{key}" for key in stage} | {"run_dir"}
    ours |= {key.removeprefix("stages.mine.") for key in ours if key.startswith("stages.mine.")}
    for line in (line for table in tables[:3] for line in table[2:]):
        for name in re.findall(r"`([a-z_A-Z.]+)(?:: \w+)?`", line.strip("| ").split(" | ")[1]):
            known = name in ours or name in TRAINING_STAGES or name in erniesearch.__all__
            assert known or name == "mine", f"{name}: {line}"
