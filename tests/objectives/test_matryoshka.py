"""objective.matryoshka_dims: the dual-encoder's terms over prefixes of its vectors, by hand; and
what reads a prefix afterwards."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.finished_run import finished_run
from support.tiny import ALL_TERMS, ConfigMaker
from torch import Tensor
from torch.nn import functional as F

from erniesearch import stages
from erniesearch.cli import main
from erniesearch.config.checks import validate
from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.batches import Batch
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.models.joint import JointModel
from erniesearch.objectives import losses
from erniesearch.objectives.objective import Objective, group_mask
from erniesearch.objectives.scores import candidate_mask
from erniesearch.retrieval.embeddings import Embeddings
from erniesearch.retrieval.load import load_retriever
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model, check_inputs


def build(config: RunConfig) -> tuple[JointModel, Batch]:
    data = load_beir(config.data.path, "train")
    model, tokenizer = build_model(Stage(config, "cascade"))
    return model.double().train(), build_batches(Stage(config, "cascade"), data, tokenizer)[0]


@pytest.mark.parametrize("normalize", [False, True])
def test_every_term_is_the_mean_over_the_vector_and_its_prefixes(
    make_config: ConfigMaker, normalize: bool
) -> None:
    """``dual_reg`` takes two dropout passes: the outputs are kept, so that both sides see them."""
    tau, kl_tau, target_tau = 0.3, 0.7, 2.0
    model, batch = build(
        make_config(normalize=normalize, tau_de=tau, tau_de_kl=kl_tau, tau_ce=target_tau,
                    matryoshka_dims=[16, 3], weights=ALL_TERMS)
    )  # fmt: skip
    outputs = model.outputs(batch)
    terms = model.objective.terms(batch, outputs, True)
    size, rows = batch.group_size, torch.arange(len(batch.query_ids))
    labels = rows * size
    mask = candidate_mask(batch.relevant_index, batch.passage_index, labels)
    late = model.objective.score(batch, outputs).late
    assert late is not None

    def cut(vectors: Tensor, dim: int) -> Tensor:
        part = vectors[:, :dim]
        return part / part.norm(dim=1, keepdim=True) if normalize else part

    expected: dict[str, list[Tensor]] = {}
    for dim in (32, 16, 3):
        q, p, q2, p2 = (cut(x, dim) for x in (
            outputs.queries.vectors, outputs.passages.vectors,
            outputs.second_queries, outputs.second_passages,
        ))  # fmt: skip
        dual = q @ p.T
        own = dual.view(len(rows), len(rows), size)[rows, rows]
        teacher = outputs.teacher_scores.view(len(rows), size) / target_tau
        found = {
            "de": losses.contrastive_loss(dual / tau, labels, mask),
            "li_to_de": losses.kl_divergence(late, dual / kl_tau, mask),
            "ce_to_de": losses.kl_divergence(teacher, own / kl_tau, group_mask(batch)),
            "dual_reg": losses.symmetric_kl(dual / tau, q2 @ p.T / tau, mask)
            + losses.symmetric_kl(dual / tau, q @ p2.T / tau, mask),
        }
        for name, value in found.items():
            expected.setdefault(name, []).append(value)
    for name, values in expected.items():
        torch.testing.assert_close(terms[name], torch.stack(values).mean(), msg=name)
        assert len({round(value.item(), 6) for value in values}) == 3, name  # the cuts differ


def test_without_prefixes_nothing_changes(make_config: ConfigMaker) -> None:
    config = make_config(dropout=0.0)
    other = replace(config, objective=replace(config.objective, matryoshka_dims=[8]))
    for name in ("cascade", "export", "evaluate"):
        assert stages.fingerprint(config, name) != stages.fingerprint(other, name)
    assert "matryoshka_dims" not in stages._decisive(asdict(config.objective))
    late = replace(config.stages.cascade, weights=LossWeights(li=1.0))
    one, two = (replace(c, stages=replace(c.stages, cascade=late)) for c in (config, other))
    assert stages.fingerprint(one, "cascade") == stages.fingerprint(two, "cascade")


@pytest.mark.parametrize(
    ("dims", "problem"),
    [([0], "of 1 or more"), ([8, 8], "none of them twice"), ([32], "have 32 dimensions"),
     ([64], "have 32 dimensions")],
)  # fmt: skip
def test_odd_dimensions_are_refused(
    dims: list[int], problem: str, make_config: ConfigMaker
) -> None:
    config = make_config(matryoshka_dims=dims)
    with pytest.raises(UserError, match=problem):
        check_inputs(validate(config), load_beir(config.data.path, "train"))
    late = make_config(matryoshka_dims=[8], weights=LossWeights(li=1.0))
    with pytest.raises(UserError, match="no stage has a term of the dual-encoder"):
        validate(late)


@pytest.fixture
def exported(make_config: ConfigMaker) -> Path:
    config = finished_run(make_config, normalize=True, matryoshka_dims=[8, 16])
    export_all(config)
    return Path(config.run_dir) / "exports"


def shortened(vectors: np.ndarray, dim: int) -> np.ndarray:
    return F.normalize(torch.from_numpy(vectors[:, :dim]), dim=1).numpy()


def test_vectors_are_shortened_where_they_are_made(
    exported: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, common = str(exported / "dual_encoder"), ("--data", str(tiny_data))
    out, index = tmp_path / "embeddings", tmp_path / "index"
    encode = ("encode", "--model", model, *common, "--out", str(out), "--dtype", "fp32",
              "--precision", "fp32", "--dim", "8")  # fmt: skip
    assert main([*encode]) == 0
    texts = load_beir(tiny_data, "test").passages
    whole = load_retriever(model).vectors(texts, "passage")
    found = np.concatenate([shard.embeddings.numpy() for shard in Embeddings(out)])
    np.testing.assert_allclose(found, shortened(whole, 8), atol=1e-6)
    assert main(["index", "--embeddings", str(out), "--out", str(index)]) == 0
    evaluate = ("evaluate", *common, "--model", model, "--precision", "fp32")
    figures = []
    for more in ((), ("--index", str(index))):
        file = tmp_path / "out.json"
        assert main([*evaluate, "--dim", "8", *more, "--json", str(file)]) == 0
        figures.append(json.loads(file.read_text())["rows"])
    assert figures[0] == figures[1]
    mine = ("mine", "--model", model, "--index", str(index), *common, "--precision", "fp32")
    assert main([*mine, "--dim", "8", "--out", str(tmp_path / "negatives.jsonl")]) == 0
    refused: list[tuple[tuple[str, ...], str]] = [
        ((*evaluate, "--index", str(index)), "and its --dim"),
        ((*evaluate, "--dim", "33"), "has vectors of 32 dimensions"),
        ((*evaluate, "--dim", "0"), "--dim 0: must be 1 or more"),
        ((*mine, "--out", str(tmp_path / "other.jsonl")), "and its --dim"),
        ((*encode[:-1], "16"), "'dim' is 8 there and 16 here"),
        (("encode", "--model", str(exported / "late_interaction"), *common, "--out",
          str(tmp_path / "tokens"), "--dim", "8"), "token vectors are not shortened"),
        (("evaluate", *common, "--model", str(exported / "cross_encoder"), "--dim", "8"),
         "no dual-encoder searches here"),
    ]  # fmt: skip
    capsys.readouterr()
    for argv, problem in refused:
        assert main([*argv]) == 2, argv
        error = capsys.readouterr().err
        assert problem in error, (argv, error)


def test_the_card_names_the_prefixes(exported: Path) -> None:
    card = (exported / "dual_encoder" / "README.md").read_text()
    assert "the first 16, 8 dimensions were trained" in card
    assert 'SentenceTransformer("PATH", truncate_dim=16)' in card
    assert "truncate_dim" not in (exported / "late_interaction" / "README.md").read_text()


def test_sentence_transformers_has_the_same_loss(make_config: ConfigMaker) -> None:
    """Its MatryoshkaLoss over MultipleNegativesRankingLoss adds up; with weights of 1/3 it is the
    mean."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    config = finished_run(make_config, normalize=True, matryoshka_dims=[16, 3], tau_de=0.05)
    export_all(config)
    folder = Path(config.run_dir) / "exports" / "dual_encoder"
    data = load_beir(config.data.path, "test")
    texts = [list(data.queries.values())[:6], list(data.passages[:6])]
    theirs = SentenceTransformer(str(folder), device="cpu").eval()
    loss = MatryoshkaLoss(
        theirs, MultipleNegativesRankingLoss(theirs, scale=1 / 0.05), [32, 16, 3], [1 / 3] * 3
    )
    prepare = getattr(theirs, "preprocess", None) or theirs.tokenize
    with torch.no_grad():
        wanted = loss([prepare(side) for side in texts], torch.empty(0))
    wanted = wanted if isinstance(wanted, Tensor) else sum(wanted.values())
    retriever = load_retriever(folder)
    queries, passages = (
        torch.from_numpy(retriever.vectors(side, name))
        for side, name in zip(texts, ("query", "passage"), strict=True)
    )
    objective = Objective(LossWeights(de=1.0), config.objective, normalize=True)
    labels = torch.arange(6)
    found = [losses.contrastive_loss(scores, labels)
             for scores in objective._dual_encoder(queries, passages)]  # fmt: skip
    torch.testing.assert_close(torch.stack(found).mean(), wanted, rtol=1e-5, atol=1e-6)
