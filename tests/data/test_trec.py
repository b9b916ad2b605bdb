"""TREC runs: what we write comes back, ir-measures and trec_eval read it, odd lines are named."""

import re
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rankings import random_run

from erniesearch.data.ranking_metrics import parse_metrics, per_query
from erniesearch.data.trec import read_trec_run, write_trec_run
from erniesearch.errors import UserError

GOOD = "q1 Q0 p1 1 2.5 tag\nq1 Q0 p2 2 2.5 tag\nq2 Q0 p1 1 -1 tag\nq1 Q0 p3 3 1e-3 tag\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "system.trec"
    path.write_text(text)
    return path


def test_a_run_is_read(tmp_path: Path) -> None:
    assert read_trec_run(written(tmp_path, GOOD)) == {
        "q1": {"p1": 2.5, "p2": 2.5, "p3": 0.001},
        "q2": {"p1": -1.0},
    }


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"),
                       st.dictionaries(st.sampled_from("xyzw"), FLOATS, min_size=1),
                       min_size=1))  # fmt: skip
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, run: dict) -> None:
    path = tmp_path_factory.mktemp("run") / "system.trec"
    write_trec_run(path, run, "system")
    back = read_trec_run(path)
    assert back.keys() == run.keys()
    for qid, scores in run.items():
        for pid, score in scores.items():
            assert np.float32(back[qid][pid]) == np.float32(score)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("q1 Q0 p4 4 0", "5 columns"),
        ("q1 Q0 p4 4 0 tag more", "7 columns"),
        ("q1 Q0 p1 4 0 tag", "passage 'p1' stands twice under query 'q1'"),
        ("q1 Q0 p4 5 0 tag", "rank 5 of query 'q1', expected 4"),
        ("q3 Q0 p4 0 0 tag", "rank 0 of query 'q3', expected 1: ranks start at 1"),
        ("q1 Q0 p4 four 0 tag", "rank four of query 'q1'"),
        ("q1 Q0 p4 4 0.002 tag", "score 0.002 of query 'q1' is above that of the rank before"),
        ("q1 Q0 p4 4 nan tag", "score nan is not finite"),
        ("q1 Q0 p4 4 -inf tag", "score -inf is not finite"),
        ("q1 Q0 p4 4 best tag", "score 'best' is not a number"),
        ("q9 Q0 p4 1 0 tag", "query 'q9' is not in queries.jsonl"),
        ("q1 Q0 p9 4 0 tag", "passage 'p9' is not in corpus.jsonl"),
    ],
)
def test_an_odd_line_is_named(line: str, problem: str, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + line + "\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:5: .*{re.escape(problem)}"):
        read_trec_run(path, {"q1", "q2", "q3"}, {"p1", "p2", "p3", "p4"})


def test_an_empty_or_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the run is empty"):
        read_trec_run(written(tmp_path, "\n\n"))
    with pytest.raises(UserError, match="no such file"):
        read_trec_run(tmp_path / "nothing.trec")
    (tmp_path / "system.trec").write_bytes(b"q1 Q0 p\xff 1 2 tag\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_trec_run(tmp_path / "system.trec")


def test_ir_measures_and_trec_eval_read_the_file_unchanged(tmp_path: Path) -> None:
    run, qrels = random_run(3)
    path = tmp_path / "system.trec"
    write_trec_run(path, run, "system")
    metrics = parse_metrics("MRR@10,nDCG@10,R@50,R@100,success@5,MAP")
    qids = list(qrels)
    ours = per_query(read_trec_run(path), qrels, qids, metrics)
    judged = [ir_measures.Qrel(q, p, g) for q, grades in qrels.items() for p, g in grades.items()]
    for metric in metrics:
        theirs = dict.fromkeys(qids, 0.0)
        for found in ir_measures.iter_calc(
            [metric.measure], judged, ir_measures.read_trec_run(str(path))
        ):
            theirs[found.query_id] = found.value
        np.testing.assert_allclose(ours[metric.name], list(theirs.values()), atol=1e-9)
    with path.open() as lines:
        parsed = pytrec_eval.parse_run(lines)
    names = {"ndcg_cut_10": "nDCG@10", "recall_50": "R@50", "recall_100": "R@100",
             "success_5": "success@5", "map": "MAP"}  # fmt: skip
    found = pytrec_eval.RelevanceEvaluator(qrels, set(names)).evaluate(parsed)
    for measure, name in names.items():
        theirs = [found.get(qid, {}).get(measure, 0.0) for qid in qids]
        np.testing.assert_allclose(ours[name], theirs, atol=1e-9)
        assert np.std(theirs) > 0
