"""An encoder without pretrained weights: the same bytes every time, and Chinese by characters."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.processes import run_python

from erniesearch.cli import main
from erniesearch.config.keys import StudentConfig
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.encoder import StudentEncoder
from erniesearch.models.scratch import SPECIAL_TOKENS, EncoderSize, train_vocabulary, write_encoder

CHINESE = [
    "范廷颂枢机，圣名保禄·若瑟，是越南罗马天主教枢机。",
    "范廷颂于1940年在河内大修道院完成神学学业；1949年晋铎。",
    "「我信天主的爱」是枢机的牧铭。1940年、1949年 running runner",
] * 2
SIZE = EncoderSize(vocab_size=200, hidden=32, layers=2, max_length=40)


def test_vocabulary_holds_characters_and_word_pieces() -> None:
    vocabulary = train_vocabulary(CHINESE, 200)
    assert vocabulary[:5] == SPECIAL_TOKENS
    assert len(vocabulary) == len(set(vocabulary)) <= 200
    assert {"范", "廷", "颂", "，", "「", "·", "1", "##9", "r"} <= set(vocabulary)
    assert not {token for token in vocabulary if "##" in token and ord(token[2]) > 0x2E80}
    assert max(map(len, vocabulary)) > 3  # merged pieces besides characters


@pytest.mark.parametrize("vocab_size", [64, 100, 1000])
def test_vocabulary_is_no_larger_than_asked(vocab_size: int) -> None:
    vocabulary = train_vocabulary(CHINESE, vocab_size)
    assert len(vocabulary) <= vocab_size
    kept = [t for t in vocabulary if t not in SPECIAL_TOKENS]
    assert "1" in kept  # the most frequent characters stay
    if vocab_size == 64:
        assert len(kept) <= 59


def test_empty_corpus_is_refused() -> None:
    with pytest.raises(UserError, match="no character occurs twice"):
        train_vocabulary(["abc", ""], 200)


TRAIN = """
import sys
from pathlib import Path
from erniesearch.models.scratch import EncoderSize, write_encoder
texts = Path(sys.argv[1]).read_text().splitlines()
write_encoder(texts, Path(sys.argv[2]), EncoderSize(200, 32, 2, 40))
"""


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """The trainer's hash tables are seeded anew in each process."""
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmno" for c in "pqrst"]
    (tmp_path / "texts").write_text("\n".join([*CHINESE, " ".join(words * 2)]))
    write_encoder((tmp_path / "texts").read_text().splitlines(), tmp_path / "here", SIZE)
    for name in ("there", "again"):
        status, output = run_python(
            "-c", TRAIN, str(tmp_path / "texts"), str(tmp_path / name), RAYON_NUM_THREADS="2",
            TOKENIZERS_PARALLELISM="true",
        )  # fmt: skip
        assert status == 0, output[-2000:]
        for file in sorted((tmp_path / "here").iterdir()):
            assert file.read_bytes() == (tmp_path / name / file.name).read_bytes(), file.name


def test_student_starts_from_it(tmp_path: Path) -> None:
    num_tokens = write_encoder(CHINESE, tmp_path / "out", SIZE)
    settings = StudentConfig(str(tmp_path / "out"), late_interaction_dim=8)
    tokenizer = load_tokenizer(settings)
    assert len(tokenizer) == num_tokens
    assert tokenizer.tokenize("范廷颂：Running") == [
        "范",
        "廷",
        "颂",
        "[UNK]",
        *tokenizer.tokenize("running"),
    ]
    ids = torch.tensor([tokenizer("范廷颂是枢机")["input_ids"]])
    student = StudentEncoder(settings, masked_lm=True)
    loss = student.masked_lm_loss(ids, ids != 0, ids).item() / ids.numel()
    assert abs(loss - math.log(num_tokens)) < 1  # untrained


def test_seed_changes_the_weights_only(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_encoder(CHINESE, tmp_path / str(seed), SIZE, seed)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    same = [n for n in names
            if (tmp_path / "1" / n).read_bytes() == (tmp_path / "2" / n).read_bytes()]  # fmt: skip
    assert sorted({*names} - {*same}) == ["model.safetensors"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"_id": f"p{i}", "title": "标题", "text": text} for i, text in enumerate(CHINESE)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["init", "encoder", "--data", str(tmp_path), "--out", str(tmp_path / "out"),
               "--hidden", "32", "--layers", "1", "--vocab_size", "200"]  # fmt: skip
    assert main(command) == 0
    assert "1 layers, hidden 32, vocabulary" in capsys.readouterr().out
    assert "题" in (tmp_path / "out" / "vocab.txt").read_text().split()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    for option, value in (("--hidden", "48"), ("--layers", "0"), ("--vocab_size", "10")):
        other = [*command[:5], str(tmp_path / "other"), option, value]
        assert main(other) == 2
        assert f"{option} {value}: must be" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
