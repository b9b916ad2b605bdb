"""The table of docs/backbones.md: what works with each family of encoders. Every cell is what a
check over a tiny random model has found: ✓, or – where the option is refused.

    PYTHONPATH=.:kernels:tests python tests/support/backbone_table.py [FAMILY …]    writes it anew
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from support.backbones import BACKBONES, write_backbone
from support.finished_run import TEXTS, finished_run, plain_states, retriever_of
from support.processes import ROOT
from support.tiny import EVERY_TERM, write_beir
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from erniesearch.config.keys import DataConfig, RunConfig, StudentConfig, TeacherConfig
from erniesearch.config.stage_keys import LossWeights, StageConfig, StagesConfig
from erniesearch.data.batches import Batch
from erniesearch.data.collection import load_beir
from erniesearch.data.text_format import encode_texts
from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.export.onnx import export_onnx
from erniesearch.models.backbone import load_config, load_tokenizer, max_positions
from erniesearch.models.cross_encoder import CrossEncoder, PairLayout, Pairs, assemble_pairs
from erniesearch.models.encoder import StudentEncoder
from erniesearch.models.joint import JointModel
from erniesearch.models.precision import tune_for_device
from erniesearch.retrieval.retriever import PairScorer
from erniesearch.run_folder import RunFolder
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model
from erniesearch.training.gradient_cache import cached_backward

PAGES = (ROOT / "docs" / "backbones.md", ROOT / "docs" / "backbones.zh-CN.md")
QUERIES = ["baran desel", "fitor"]
PASSAGES = ["goran kuran lazul mivix", "mipat", "nohod baran desel fitor", "gowen"]
LONG = " ".join(["baran desel kuran"] * 6)  # wider than the tiny ModernBERT's windows


@dataclass(frozen=True)
class Site:
    """A family's tiny model in a folder of its own."""

    family: str
    folder: Path

    @cached_property
    def model(self) -> str:
        return str(write_backbone(self.folder / "model", self.family))

    def student(self, masked_lm: bool = False, **changes: Any) -> StudentEncoder:
        torch.manual_seed(0)
        settings = StudentConfig(self.model, late_interaction_dim=16)
        return StudentEncoder(replace(settings, **changes), masked_lm).eval()

    def teacher(self, layers: tuple[int, ...] = (), **changes: Any) -> CrossEncoder:
        torch.manual_seed(0)
        return CrossEncoder(TeacherConfig(self.model, **changes), layers).eval()

    def inputs(self, *texts: str) -> tuple[Tensor, Tensor]:
        return encode_texts(load_tokenizer(StudentConfig(self.model)), list(texts), 32)

    def pairs(self) -> tuple[Tensor, Pairs]:
        """The passages' mask, and the pairs."""
        tokenizer = load_tokenizer(StudentConfig(self.model))
        query, passage = self.inputs(*QUERIES), self.inputs(*PASSAGES)
        layout = PairLayout.of(tokenizer)
        return passage[1], assemble_pairs(*query, *passage, layout, int(tokenizer.pad_token_id))

    def config(self, weights: LossWeights, **student: Any) -> RunConfig:
        if not (self.folder / "data").is_dir():
            write_beir(self.folder / "data")
        stage = StageConfig(
            steps=2, queries_per_rank=4, num_negatives=2, negatives="random", weights=weights
        )
        return RunConfig(
            run_dir=str(self.folder / "run"),
            data=DataConfig(str(self.folder / "data"), max_query_length=8, max_passage_length=16),
            student=StudentConfig(self.model, late_interaction_dim=16, **student),
            teacher=TeacherConfig(dropout=student.get("dropout")),
            stages=StagesConfig(cascade=stage),
        )

    def joint(self, weights: LossWeights, **student: Any) -> tuple[JointModel, Batch]:
        return made(self.config(weights, **student))


def made(config: RunConfig) -> tuple[JointModel, Batch]:
    """A stage's model and its first batch."""
    stage = Stage(config, "cascade")
    model, tokenizer = build_model(stage)
    data = load_beir(config.data.path, "train")
    return model, build_batches(stage, data, tokenizer)[0]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Up to rounding, whose size is that of the largest values: what ought to be 0, such as the
    gradient of a key's bias, is the rounding of others."""
    assert ours.keys() == theirs.keys()
    largest = max(float(value.detach().abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        near = 1e-4 * float(value.detach().abs().max()) + 1e-5 * largest
        assert_close(ours[name], value, rtol=0, atol=near, msg=lambda m, n=name: f"{n}: {m}")


def dual_encoder(site: Site) -> None:
    """A text's vector does not depend on the padding beside it, and trains every layer."""
    for pooling in ("cls", "mean"):
        student = site.student(pooling=pooling)
        together = student(*site.inputs(*PASSAGES, LONG), "passage", tokens=False).vectors
        for text, vector in zip([*PASSAGES, LONG], together, strict=True):
            alone = student(*site.inputs(text), "query", tokens=False).vectors[0]
            assert_close(alone, vector, rtol=0, atol=1e-5)
        together.square().sum().backward()
        assert all(f".{layer}." in " ".join(gradients(student)) for layer in range(3))


def late_interaction(site: Site) -> None:
    """Nor do its token vectors, which have length 1."""
    student = site.student()
    ids, mask = site.inputs(*PASSAGES, LONG)
    together = student(ids, mask, "passage", vectors=False).tokens
    assert_close(together.norm(dim=-1), torch.ones(mask.shape))
    for i, text in enumerate([*PASSAGES, LONG]):
        alone = student(*site.inputs(text), "query").tokens[0]
        assert_close(alone, together[i][mask[i]], rtol=0, atol=1e-5)


def cross_encoder(site: Site) -> None:
    """Pairs are the tokenizer's own; a score does not depend on the padding."""
    tokenizer = load_tokenizer(StudentConfig(site.model))
    pairs, model = site.pairs()[1], site.teacher()
    expected = tokenizer([q for q in QUERIES for _ in range(2)], PASSAGES, padding=True,
                         return_tensors="pt")  # fmt: skip
    assert torch.equal(pairs.input_ids, expected["input_ids"])
    assert torch.equal(pairs.mask.long(), expected["attention_mask"])
    scores = model(pairs)
    for i, length in enumerate(pairs.mask.sum(1).tolist()):
        alone = model(Pairs(*(part[i : i + 1, :length] for part in pairs)))
        assert_close(alone[0], scores[i], rtol=0, atol=1e-5)


def eager_maps(site: Site, model: CrossEncoder, pairs: Pairs) -> tuple[Tensor, ...]:
    """The model's own attention maps ``[N, heads, L, L]``, layer by layer."""
    eager = AutoModelForSequenceClassification.from_pretrained(
        site.model, num_labels=1, attn_implementation="eager"
    ).eval()
    eager.load_state_dict(model.model.state_dict())
    types = {"token_type_ids": pairs.token_type_ids} if model.uses_token_types else {}
    output = eager(
        input_ids=pairs.input_ids, attention_mask=pairs.mask.long(), output_attentions=True, **types
    )
    assert_close(model(pairs), output.logits.squeeze(-1), rtol=0, atol=1e-5)
    return tuple(output.attentions)


def attention(site: Site) -> None:
    """The target equals the model's own map: head mean, and head by head in both directions."""
    passage_mask, pairs = site.pairs()
    model = site.teacher((-1, 0))
    maps = eager_maps(site, model, pairs)
    assert maps[-1].std() > 0.05  # it looks somewhere
    made = model.attention(pairs, budget=100)
    logits = made.queries @ made.keys.mT / made.queries.shape[-1] ** 0.5
    ours = (logits - made.lse[..., None]).exp().mean(1)  # [N, Lq, Lp]
    assert_close(model.attention(pairs).lse, made.lse)
    for n, columns in enumerate(pairs.passage_columns):
        rows, real = pairs.query_columns[n], passage_mask[n]
        there = pairs.mask[n][rows]
        expected = maps[-1].mean(1)[n][rows][:, columns[real]]
        assert_close(ours[n][there][:, real], expected[there], rtol=0, atol=1e-5)
    for layer in (0, -1):
        (query_q, query_k), (passage_q, passage_k) = model.sides(pairs, layer)
        places = pairs.query_columns, pairs.passage_columns
        for first, second, rows, columns in (
            (query_q, passage_k, *places), (passage_q, query_k, *reversed(places))
        ):  # fmt: skip
            logits = first @ second.mT / first.shape[-1] ** 0.5
            for n, mask in enumerate(pairs.mask):
                there, real = mask[rows[n]], mask[columns[n]]
                own = logits[n][:, there][..., real].softmax(-1)
                expected = maps[layer][n][:, rows[n][there]][:, :, columns[n][real]]
                expected = expected / expected.sum(-1, keepdim=True)
                assert_close(own, expected, rtol=0, atol=1e-5)


def virt(site: Site) -> None:
    """The term trains the student's last queries and keys, and not the teacher."""
    model, batch = site.joint(LossWeights(virt=1.0), dropout=0.0)
    term = model(batch)["loss"]
    assert 0 < term < torch.inf
    term.backward()
    reached = {name for name, gradient in gradients(model).items() if gradient.any()}
    assert any(".2." in name for name in reached)
    assert not any(name.startswith("teacher.") for name in reached)


def layers(site: Site) -> None:
    """A cut student is its layers, and is read again as what it is."""
    student, whole = site.student(layers=2), site.student().query_tower
    owner, name = next(
        (module, name) for module in whole.modules() for name, child in module.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == 3
    )  # fmt: skip
    setattr(owner, name, torch.nn.ModuleList(getattr(owner, name)[i] for i in (0, 2)))
    ids, mask = site.inputs(*PASSAGES, LONG)
    tower = student.query_tower
    states = tower(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    whole.config.num_hidden_layers = 2
    if hasattr(whole.config, "layer_types"):
        whole.config.layer_types = [whole.config.layer_types[i] for i in (0, 2)]
    expected = whole(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert_close(states, expected)
    student.save(site.folder / "cut", dict(student.state_dict()))
    again = site.student(path=str(site.folder / "cut"))
    assert again.query_tower.config.num_hidden_layers == 2
    assert_close(again(ids, mask, "query").tokens, student(ids, mask, "query").tokens)


def post_train(site: Site) -> None:
    """Masked words' loss and gradients as by the logits of every token, which are not made."""
    student = site.student(masked_lm=True)
    ids, mask = site.inputs(*PASSAGES, LONG)
    labels = torch.where((ids % 3 == 0) & mask, ids, -100)
    assert student.masked_lm is not None
    logits = student.masked_lm(input_ids=ids, attention_mask=mask.long()).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    head = student.masked_lm.get_output_embeddings()
    seen: list[int] = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    found = student.masked_lm_loss(ids, mask, labels)
    found.backward()
    assert seen == [int((labels != -100).sum()) * logits.shape[-1]]
    same(gradients(student) | {"loss": found}, wanted | {"loss": expected})


def recomputation(site: Site) -> None:
    """activation_checkpointing, with dropout and frozen word embeddings: the same gradients."""
    found = []
    for recompute in (True, False):
        config = site.config(LossWeights(ce=1.0, li=1.0, de=1.0), dropout=0.1,
                             freeze_embeddings=True)  # fmt: skip
        training = replace(config.training, activation_checkpointing=recompute)
        config = replace(config, training=training)
        model, batch = made(config)
        tune_for_device(model, config, torch.device("cpu"), bf16=False)
        model.train()(batch)["loss"].backward()
        found.append(gradients(model))
        assert model.student is not None
        words = model.student.query_tower.get_input_embeddings().weight
        assert words.grad is None
    same(*found)


def gradient_caching(site: Site) -> None:
    """chunk_size: the same terms and gradients as in one pass, over attention too if it has it."""
    try:
        model, batch = site.joint(replace(EVERY_TERM, dual_reg=0.0), dropout=0.0)
    except UserError:
        model, batch = site.joint(LossWeights(ce=1.0, li=1.0, de=1.0, ce_to_de=1.0), dropout=0.0)
    found = []
    for run in (
        lambda: model(batch)["loss"].backward(),
        lambda: cached_backward(model, model, Tensor.backward, batch, 5),
    ):
        model.zero_grad()
        run()
        found.append(gradients(model))
    same(*found)


def unpadded(site: Site) -> None:
    """attn_implementation unpadded: states, gradients, scores and attention as with padding."""
    ids, mask = site.inputs(*PASSAGES, LONG)
    passage_mask, pairs = site.pairs()
    weights = torch.randn(*mask.shape, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.where((ids % 3 == 0) & mask, ids, -100)
    with_attention = site.family not in ("deberta-v2",)
    found = []
    for way in ("unpadded", None):
        student = site.student(True, dropout=0.0, attn_implementation=way)
        teacher = site.teacher((-1,) * with_attention, dropout=0.0, attn_implementation=way)
        student.tap_layers([1] * with_attention)
        encoded = student(ids, mask, "passage", projections=with_attention)
        loss = (encoded.tokens * weights)[mask].sum() + encoded.vectors.sum()
        loss = loss + student.masked_lm_loss(ids, mask, labels)
        if with_attention:
            loss = loss + encoded.projections[mask].square().sum()
        loss.backward()
        found.append({"scores": teacher(pairs), "loss": loss} | gradients(student))
        if with_attention:
            made, real = teacher.attention(pairs), pairs.mask.gather(1, pairs.query_columns)
            found[-1] |= {
                "lse": made.lse.transpose(1, 2)[real],
                "keys": made.keys.transpose(1, 2)[passage_mask],
            }
    same(*found)


def exported(site: Site) -> None:
    """Exported folders, read by transformers alone, give our vectors and scores."""

    def make(stage: str, weights: LossWeights) -> RunConfig:
        return site.config(weights, pooling="mean")

    config = finished_run(make)
    student, token_model, teacher = export_all(config)
    states, mask = plain_states(student, TEXTS)
    ours = retriever_of(config)
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert_close(pooled.numpy(), ours.vectors(TEXTS, "passage"), rtol=0, atol=1e-5)
    about = json.loads((token_model / "1_Dense" / "config.json").read_text())
    assert about["in_features"] == states.shape[-1]
    source = RunFolder(config.run_dir).model("cascade", "teacher")
    scorers = [PairScorer(TeacherConfig(str(path)), 8, 16) for path in (source, teacher)]
    scores = [scorer.scores(TEXTS[:2], TEXTS[2:]) for scorer in scorers]
    assert_close(*scores, rtol=0, atol=1e-6)
    assert abs(scores[0][0] - scores[0][1]) > 1e-4


def onnx(site: Site) -> None:
    """The dual-encoder as ONNX; it is compared with PyTorch before it is kept."""
    folder = site.folder / "onnx"
    student = site.student()
    student.save(folder, dict(student.state_dict()))
    load_tokenizer(StudentConfig(site.model)).save_pretrained(folder)
    export_onnx(folder)


def longest(site: Site) -> str:
    """Tokens that it reads, by ``max_position_embeddings`` P = 64: that many and no more."""
    limit = max_positions(load_config(StudentConfig(site.model)))
    text = " ".join(["baran"] * 200)
    tokenizer = load_tokenizer(StudentConfig(site.model))
    student = site.student()
    states = student(*encode_texts(tokenizer, [text], min(limit, 150)), "passage").tokens
    assert states.shape[1] == min(limit, 150)
    assert states.isfinite().all()
    return {64: "P", 62: "P − 2"}.get(limit, "any")


CHECKS: dict[str, Callable[[Site], str | None]] = {
    "dual-encoder": dual_encoder,
    "late interaction": late_interaction,
    "cross-encoder": cross_encoder,
    "`attention`": attention,
    "`virt`": virt,
    "`layers`": layers,
    "`post_train`": post_train,
    "`activation_checkpointing`": recomputation,
    "`chunk_size`": gradient_caching,
    "`unpadded`": unpadded,
    "export": exported,
    "ONNX": onnx,
    "longest": longest,
}


def cell(check: str, family: str, folder: Path) -> str:
    """What the check finds."""
    try:
        return CHECKS[check](Site(family, folder)) or "✓"
    except UserError as error:
        sys.stderr.write(f"{family}, {check}: {error}\n")
        return "–"


def read_cells(page: Path) -> dict[str, list[str]]:
    """Cells of the page's table by family."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if len(parts) == len(CHECKS) + 1 and parts[0].strip("`") in BACKBONES:
            found[parts[0].strip("`")] = parts[1:]
    return found


def main() -> None:
    """Write the rows of both pages' tables, or of the families that are named."""
    rows = read_cells(PAGES[0])
    for family in sys.argv[1:] or BACKBONES:
        rows[family] = []
        for check in CHECKS:
            with tempfile.TemporaryDirectory() as folder:
                rows[family].append(cell(check, family, Path(folder)))
        sys.stdout.write(f"{family} {' '.join(rows[family])}\n")
        sys.stdout.flush()
    table = [f"| `{name}` | {' | '.join(rows[name])} |\n" for name in BACKBONES if name in rows]
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
        (rule,) = [i for i, line in enumerate(lines) if line.startswith("|---|:-:|")]
        end = next(i for i in range(rule + 1, len(lines)) if not lines[i].startswith("|"))
        page.write_text("".join([*lines[: rule + 1], *table, *lines[end:]]), encoding="utf-8")


if __name__ == "__main__":
    main()
