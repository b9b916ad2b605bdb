"""The command line: every mistake ends in one line and exit status 2, never in a traceback."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.backbones import write_backbone
from support.inputs import replace_line
from support.processes import ROOT
from support.tiny import ConfigMaker, write_beir, write_model
from transformers import AutoTokenizer, FNetConfig, FNetModel

from erniesearch import __version__, stages
from erniesearch.cli import COMMANDS, main
from erniesearch.config.keys import RunConfig, StudentConfig, TeacherConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.yaml_file import to_yaml
from erniesearch.run_folder import RunFolder, claimed

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Commands set environment variables and threads for their own process: undo both."""
    variables, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set that a test may break."""
    return write_beir(tmp_path / "data")


@pytest.fixture
def config(make_config: ConfigMaker, data: Path) -> RunConfig:
    """A good config: the cascade with every term."""
    good = make_config(stage="cascade", steps=2)
    return replace(good, data=replace(good.data, path=str(data)))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused; returns its one line without the prefix."""

    def run(config: RunConfig | None, *argv: str) -> str:
        arguments = list(argv)
        if config is not None:
            file = tmp_path / "run.yaml"
            file.write_text(to_yaml(config))
            arguments[1:1] = ["--config", str(file)]
        capsys.readouterr()
        status = main(arguments)
        error = capsys.readouterr().err
        assert_one_line(status, error)
        return error.removeprefix("erniesearch: error: ").rstrip("\n")

    return run


def assert_one_line(status: int, error: str) -> None:
    assert status == 2, error
    assert error.startswith("erniesearch: error: "), error
    assert error.count("\n") == 1, error
    assert error.endswith("\n")


def process(*argv: str) -> tuple[int, str, str]:
    """``erniesearch …`` in a process of its own: status, standard output, standard error."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-m", "erniesearch.cli", *argv], capture_output=True, text=True,
        check=False, cwd=ROOT, timeout=200,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


BOTH = [("run",), ("train", "--stage", "cascade")]
both = pytest.mark.parametrize("command", BOTH, ids=lambda command: command[0])


# --- data ---------------------------------------------------------------------------------------

BAD_DATA = {
    "broken JSON": ("corpus.jsonl", 3, '{"_id": "p2",', "not valid JSON"),
    "duplicate passage": ("corpus.jsonl", 9, '{"_id": "p0", "text": "x"}', "duplicate id 'p0'"),
    "duplicate query": ("queries.jsonl", 9, '{"_id": "q0", "text": "x"}', "duplicate query id"),
    "unknown query": ("qrels/train.tsv", 4, "nobody\tp1\t1", "query 'nobody' is not in"),
    "unknown passage": ("qrels/train.tsv", 4, "q1\tnothing\t1", "passage 'nothing' is not in"),
}


@both
@pytest.mark.parametrize("case", BAD_DATA)
def test_odd_data_is_refused(
    case: str, command: tuple[str, ...], config: RunConfig, data: Path, refused: Refused
) -> None:
    file, number, line, problem = BAD_DATA[case]
    replace_line(data / file, number, line)
    message = refused(config, *command)
    assert message.startswith(f"{data / file}:{number}: ")
    assert problem in message


@both
@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_missing_data_file_is_refused(
    file: str, command: tuple[str, ...], config: RunConfig, data: Path, refused: Refused
) -> None:
    (data / file).unlink()
    assert refused(config, *command).startswith(f"{data / file}: no such file")


@both
def test_empty_corpus_is_refused(
    command: tuple[str, ...], config: RunConfig, data: Path, refused: Refused
) -> None:
    (data / "corpus.jsonl").write_text("")
    assert refused(config, *command) == f"{data / 'corpus.jsonl'}: the corpus is empty"


def test_missing_evaluation_split_is_refused_before_training(
    config: RunConfig, data: Path, refused: Refused
) -> None:
    (data / "qrels" / "test.tsv").unlink()
    assert "test.tsv: no such file; splits here: dev, train" in refused(config, "run")
    assert not (Path(config.run_dir) / "stages").exists()


def test_group_larger_than_the_corpus_is_refused(config: RunConfig, refused: Refused) -> None:
    large = replace(config.stages.cascade, num_negatives=100)
    config = replace(config, stages=replace(config.stages, cascade=large))
    message = refused(config, "train", "--stage", "cascade")
    assert message.startswith("num_negatives is 100, but the corpus of 60 passages leaves 59")


# --- configuration ------------------------------------------------------------------------------


@both
def test_missing_config_is_refused(
    command: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "nowhere.yaml"
    message = refused(None, *command, "--config", str(file))
    assert message.startswith(f"{file}: no such config file")
    assert "no configuration: give --config FILE" in refused(None, *command)


@both
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sed: 1\n", "unknown key 'sed' (did you mean 'seed'?)"),
        ("training: fast\n", "'training' must be a mapping"),
        ("a: [1\n", ":2: not valid YAML"),
        ("- 1\n", "expected a mapping"),
    ],
)
def test_odd_config_file_is_refused(
    text: str, problem: str, command: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    message = refused(None, *command, "--config", str(file))
    assert message.startswith(str(file))
    assert problem in message


@both
def test_odd_value_and_option_are_refused(
    command: tuple[str, ...], config: RunConfig, refused: Refused
) -> None:
    assert "ten" in (message := refused(config, *command, "--stages.cascade.steps", "ten"))
    assert "stages.cascade.steps" in message
    assert "is -1: must be 0 or more" in refused(config, *command, "--stages.cascade.steps", "-1")
    message = refused(config, *command, "--stages.cascade.stepps", "1")
    assert message == (
        "unknown option '--stages.cascade.stepps' (did you mean 'stages.cascade.steps'?)"
    )


@both
def test_zero_set_in_two_places_is_refused(
    command: tuple[str, ...], config: RunConfig, refused: Refused
) -> None:
    twice = ("--training.zero_stage", "2", "--training.zero_json", "configs/deepspeed/zero2.json")
    assert "one place for one value" in refused(config, *command, *twice)


# --- models -------------------------------------------------------------------------------------


@both
def test_different_vocabularies_are_refused(
    command: tuple[str, ...], config: RunConfig, tmp_path: Path, refused: Refused
) -> None:
    other = write_model(tmp_path / "other", words=["zebra", "yak"])
    message = refused(replace(config, teacher=TeacherConfig(str(other))), *command)
    assert "have different vocabularies" in message
    assert config.student.path in message
    assert str(other) in message
    assert "69 and 7 tokens" in message


def write_without_projections(folder: Path, family: str, tokenizer: Path) -> Path:
    """A model whose layers have no query and key projections, or whose attention has more."""
    if family == "deberta-v2":
        return write_backbone(folder, family)
    model = FNetModel(
        FNetConfig(vocab_size=69, hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@both
@pytest.mark.parametrize("family", ["deberta-v2", "fnet"])
def test_attention_from_a_model_that_has_none_is_refused(
    family: str, command: tuple[str, ...], config: RunConfig, tmp_path: Path, refused: Refused
) -> None:
    folder = write_without_projections(tmp_path / family, family, Path(config.student.path))
    message = refused(replace(config, teacher=TeacherConfig(str(folder))), *command)
    assert message.startswith(f"teacher '{folder}' ({family}) cannot give attention")
    assert "weights.attention to 0" in message


@both
def test_virt_of_a_student_without_projections_is_refused(
    command: tuple[str, ...], config: RunConfig, tmp_path: Path, refused: Refused
) -> None:
    folder = write_without_projections(tmp_path / "student", "fnet", Path(config.student.path))
    cascade = replace(config.stages.cascade, weights=LossWeights(de=1.0, virt=1.0))
    config = replace(
        config, stages=replace(config.stages, cascade=cascade),
        teacher=TeacherConfig(config.student.path),
        student=replace(config.student, path=str(folder)),
    )  # fmt: skip
    message = refused(config, *command)
    assert message.startswith(f"student '{folder}' (fnet) cannot give attention")
    assert "set the stages' weights.virt to 0, or take one of bert, " in message


@both
@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("bert", ["--student.attn_implementation", "flash_attention_2"],
         "student.attn_implementation is flash_attention_2, but there is no GPU"),
        ("bert", ["--teacher.attn_implementation", "unpadded"],
         "is unpadded, which has no attention dropout, but .* set teacher.dropout to 0"),
        ("mpnet", ["--student.attn_implementation", "unpadded"],
         r"is unpadded, which '.*' \(mpnet\) does not have"),
        ("mpnet", ["--teacher.attn_implementation", "sdpa"],
         r"is sdpa, which '.*' \(mpnet\) does not have"),
        ("mpnet", ["--training.activation_checkpointing", "true"],
         "activation_checkpointing is true, but mpnet cannot recompute its activations"),
        ("modernbert", ["--student.layers", "[1, 2]"],
         r"student.layers is \[1, 2\]: the first layer of a ModernBERT .* begin with 0"),
        ("modernbert", ["--data.max_passage_length", "60"],
         "reads at most 64 tokens, the data settings need 68"),
    ],
)  # fmt: skip
def test_what_a_family_has_not_is_refused(
    family: str, options: list[str], expected: str, command: tuple[str, ...], config: RunConfig,
    tmp_path: Path, refused: Refused,
) -> None:  # fmt: skip
    folder = str(write_backbone(tmp_path / family, family))
    config = replace(
        config, student=StudentConfig(folder, late_interaction_dim=16),
        teacher=TeacherConfig(folder),
    )  # fmt: skip
    assert re.search(expected, refused(config, *command, *options))


@both
@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("package:no_such_package", "the Python package 'no_such_package' is not installed"),
        ("./no/such/folder", "no such folder"),
        ("{empty}", "no config.json"),
    ],
)
def test_missing_model_is_refused(
    path: str, problem: str, command: tuple[str, ...], config: RunConfig, tmp_path: Path,
    refused: Refused,
) -> None:  # fmt: skip
    path = path.replace("{empty}", str(tmp_path))
    message = refused(replace(config, student=replace(config.student, path=path)), *command)
    assert path in message
    assert problem in message


@both
def test_texts_longer_than_the_model_reads_are_refused(
    command: tuple[str, ...], config: RunConfig, refused: Refused
) -> None:
    config = replace(config, data=replace(config.data, max_passage_length=60))
    message = refused(config, *command)  # 8 + 60 tokens in a pair, 64 positions
    assert "reads at most 64 tokens, the data settings need 68" in message


# --- stages -------------------------------------------------------------------------------------


def test_missing_stage_input_is_refused(config: RunConfig, refused: Refused) -> None:
    one = replace(config.stages.interaction, steps=1)
    config = replace(config, stages=replace(config.stages, interaction=one))
    message = refused(config, "train", "--stage", "cascade")
    assert message.startswith("stage cascade starts from the student of stage interaction")
    assert "train interaction first" in message


@pytest.mark.parametrize("kind", ["bm25", "mined"])
def test_missing_negatives_are_refused(config: RunConfig, kind: str, refused: Refused) -> None:
    option = ("--stages.cascade.negatives", kind)
    message = refused(config, "train", "--stage", "cascade", *option)
    assert message.startswith(f"stage cascade needs {kind} negatives, but ")
    assert "negatives.jsonl is missing" in message


def test_unknown_stage_and_step_are_refused(config: RunConfig, refused: Refused) -> None:
    message = refused(config, "train", "--stage", "cascad")
    assert message.startswith("--stage cascad: one of post_train, ")
    assert "did you mean 'cascade'?" in message
    assert "stage teacher is left out" in refused(config, "train", "--stage", "teacher")
    message = refused(config, "run", "--only", "cascade,exprt")
    assert message == "--only exprt: this run has teacher_check, cascade, export, evaluate"


def test_config_that_trains_nothing_is_refused(config: RunConfig, refused: Refused) -> None:
    assert "trains nothing" in refused(config, "run", "--stages.cascade.steps", "0")


def test_more_evaluation_passages_than_there_are_is_refused(
    config: RunConfig, refused: Refused
) -> None:
    message = refused(config, "run", "--evaluation.num_distractors", "100000")
    assert message.startswith("evaluation.num_distractors is 100000")


# --- other commands -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?); see --help"),
        (["data"], "unknown command 'data'"),
        (["data", "pydoc"], "unknown command 'data pydoc' (did you mean 'data pydocs'?)"),
        (["search", "--run", "nowhere", "a query"], "nowhere/config.yaml: no such file"),
        (["search", "a query"], "nothing to search: give --run DIR, or --model, --index and"),
        (["search", "--run", "x", "q", "--rerank", "both"], "--rerank both: none, "),
        (["search", "--run", "x", "q", "--depth", "0"], "--depth 0: must be 1 or more"),
        (["report", "--run", "nowhere"], "--run nowhere: no such folder"),
        (["data", "pydocs"], "arguments are required: out"),
        (["data", "pycode"], "arguments are required: out"),
        (["data", "pycode", "--out", "x", "--max_pairs", "3"], "--max_pairs is 3"),
        (["evaluate", "--data", "x", "--bm25_tokenizer", "words2"], "bm25_tokenizer"),
        (["data", "pydocs", "--out", "x", "--max_pairs", "few"], "max_pairs"),
        (["data", "pydocs", "--out", "x", "--max_pairs", "3"], "--max_pairs is 3"),
    ],
)
def test_odd_command_is_refused(argv: list[str], problem: str, refused: Refused) -> None:
    assert problem in refused(None, *argv)


def test_search_before_training_is_refused(config: RunConfig, refused: Refused) -> None:
    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    assert "the run has no trained student" in refused(None, "search", "--run", str(run_dir), "q")


def test_only_the_first_rank_speaks(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "--stage", "nothing", "--run_dir", "x"]) == 2
    assert capsys.readouterr().err == ""


def test_odd_values_do_not_fill_or_control_the_terminal(refused: Refused) -> None:
    message = refused(None, "train\x1b[31m\n" + "x" * 5000)
    assert message.startswith("unknown command 'train\N{REPLACEMENT CHARACTER}[31m xxx")
    assert message.endswith("see --help")
    assert len(message) < 1000


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("run", "train", "search", "report", "data"))
    assert main([]) == 2


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_every_command_exits_0(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"erniesearch {name}" in capsys.readouterr().out


def test_a_flag_means_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    """``--run`` is a finished run's folder, ``--rerank`` a kind of model, ``--data`` a data set."""
    meanings: dict[str, dict[str, str]] = {"run": {}, "rerank": {}}
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        shown = capsys.readouterr().out
        for flag, told in meanings.items():
            if found := re.search(
                rf"^  --{flag} .*?([A-Z].*(?:\n {{10,}}.*)*)", shown, re.MULTILINE
            ):
                told[name] = " ".join(re.sub(r"\(.*\)", "", found[1].split(f"{flag.upper()} ")[-1])
                                      .split())  # fmt: skip
    assert len(meanings["run"]) >= 5
    assert {text.split(".")[0] for text in meanings["run"].values()} == {"Folder of a finished run"}
    assert list(meanings["rerank"]) == ["search"]


@both
def test_data_is_the_folder_in_every_command(
    command: tuple[str, ...], config: RunConfig, refused: Refused
) -> None:
    assert refused(config, *command, "--data", "no/such").startswith("no/such: no such folder")


def test_print_config_shows_the_resolved_config(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(file), "--seed", "77", "--print_config"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "seed: 77" in shown
    assert f"run_dir: {config.run_dir}" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"erniesearch {__version__}\n"


# --- in a process of its own --------------------------------------------------------------------


def test_process_prints_one_line_and_ends_with_status_2(
    config: RunConfig, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    replace_line(data / "corpus.jsonl", 2, "{")
    for command in BOTH:
        status, output, error = process(*command, "--config", str(file))
        assert_one_line(status, error)
        assert "corpus.jsonl:2: not valid JSON" in error
        assert "Traceback" not in output


def test_damaged_checkpoints_alone_stop_the_process(config: RunConfig, tmp_path: Path) -> None:
    """Not even torch's or DeepSpeed's words come between the user and the remedy."""
    weights = LossWeights(de=1.0)
    one = replace(config.stages.cascade, weights=weights)
    config = replace(config, stages=replace(config.stages, cascade=one))
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    folder = RunFolder(config.run_dir).stage("cascade")
    with claimed(folder, stages.fingerprint(config, "cascade", 1)):
        pass
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(
        '{"step": 1, "world_size": 1, "files": {"weights.pt": 10}}'
    )
    status, _, error = process("train", "--stage", "cascade", "--config", str(file))
    assert_one_line(status, error)
    assert f"every checkpoint in {checkpoint.parent} is damaged (step-000001: manif" in error
    assert not (folder / "done.json").exists()
