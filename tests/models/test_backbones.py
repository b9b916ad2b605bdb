"""What the families of encoders do differently; the table of docs/backbones.md is made of it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbone_table import CHECKS, PAGES, Site, cell, gradients, made, read_cells, same
from support.backbones import BACKBONES, write_backbone
from support.tiny import ALL_TERMS, EVERY_TERM
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PretrainedConfig
from transformers import modeling_flash_attention_utils as flash

from erniesearch.config.keys import StudentConfig, TeacherConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.errors import UserError
from erniesearch.models import attention
from erniesearch.models.backbone import load_encoder, max_positions, without_weights
from erniesearch.models.cross_encoder import CrossEncoder, Pairs
from erniesearch.models.families import set_dropout
from erniesearch.models.precision import MASKED, convert, tune_for_device
from erniesearch.models.projections import ProjectionTap
from erniesearch.objectives.scores import attention_kl
from erniesearch.stages import fingerprint

CELLS = [
    pytest.param(family, check, marks=[pytest.mark.slow] * (check == "ONNX"))
    for family in BACKBONES
    for check in CHECKS
]


@pytest.mark.parametrize(("family", "check"), CELLS)
def test_the_table_says_what_works(family: str, check: str, tmp_path: Path) -> None:
    found = cell(check, family, tmp_path)
    for page in PAGES:
        assert read_cells(page)[family][list(CHECKS).index(check)] == found, page.name


def test_the_table_lists_every_family() -> None:
    for page in PAGES:
        assert list(read_cells(page)) == list(BACKBONES)


def test_attention_of_another_form_is_refused(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path / "deberta", "deberta-v2")
    with pytest.raises(UserError, match=r"deberta-v2\) cannot give attention.*distance.*bert, ern"):
        CrossEncoder(TeacherConfig(str(folder)), attention_layers=[-1])
    folder = write_backbone(tmp_path / "convbert", "convbert")
    with pytest.raises(UserError, match=r"convbert\) cannot give attention.*weights.attention"):
        CrossEncoder(TeacherConfig(str(folder)), attention_layers=[-1])


def test_a_window_is_no_target(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path, "modernbert")
    message = r"layer 1 of the teacher .* attends to a window of 4 tokens.*\(\[0, 2\]\)"
    with pytest.raises(UserError, match=message):
        CrossEncoder(TeacherConfig(str(folder)), attention_layers=[-1, 1])


def test_a_model_of_the_same_name_and_another_form_is_refused(tmp_path: Path) -> None:
    model = Site("nomic_bert", tmp_path).teacher().model
    for layer in model.base_model.layers:
        layer.attn = layer.self_attn
        del layer.self_attn
    with pytest.raises(UserError, match=r"calls itself nomic_bert, but is built otherwise"):
        ProjectionTap(model, "teacher", "there", [-1])


@pytest.mark.parametrize(
    ("family", "settings", "tokens"),
    [
        ("modernbert", {}, 8192), ("nomic_bert", {}, 2048), ("gte", {}, 8192), ("bert", {}, 512),
        ("mpnet", {"max_position_embeddings": 514}, 512), ("distilbert", {}, 512),
        ("xlm-roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("deberta-v2", {"position_biased_input": False}, 1 << 30), ("deberta-v2", {}, 512),
    ],
)  # fmt: skip
def test_longest_inputs(family: str, settings: dict[str, Any], tokens: int) -> None:
    assert max_positions(AutoConfig.for_model(family, **settings)) == tokens


@pytest.mark.parametrize("family", BACKBONES)
def test_the_dropout_override_reaches_every_dropout(family: str, tmp_path: Path) -> None:
    site = Site(family, tmp_path)
    ids, mask = site.inputs("baran desel kuran", "fitor")
    for rate, equal in ((0.0, True), (0.5, False)):
        for model in (site.student(dropout=rate), site.teacher(dropout=rate)):
            model.train()
            pairs = ids, mask, torch.zeros_like(ids), ids, ids
            once, twice = (
                model(Pairs(*pairs)) if isinstance(model, CrossEncoder)
                else model(ids, mask, "query").vectors for _ in range(2)
            )  # fmt: skip
            assert torch.equal(once, twice) is equal
            rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
            assert rates == {rate}


def test_a_dropout_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(fnet-like\): no dropout of it is known"):
        set_dropout(PretrainedConfig(model_type="fnet-like"), 0.1, "some/model")


# --- how attention is computed ------------------------------------------------------------------


@pytest.mark.parametrize("family", BACKBONES)
def test_a_gpus_attention_gives_the_same_terms(family: str, tmp_path: Path) -> None:
    """With a mask always (``sdpa_masked``), windows included; what has plain attention keeps it."""
    site = Site(family, tmp_path)
    config = site.config(LossWeights(ce=1.0, li=1.0, de=1.0), dropout=0.0)
    model, batch = made(config)
    expected = {name: value.detach() for name, value in model(batch).items()}
    before = {tower.config._attn_implementation for tower in model.towers()}
    tune_for_device(model, config, torch.device("cuda"), bf16=False)
    after = {tower.config._attn_implementation for tower in model.towers()}
    assert after == ({MASKED} if before == {"sdpa"} else {"eager"})
    same({name: value.detach() for name, value in model(batch).items()}, expected)


@pytest.mark.parametrize("chosen", [None, "sdpa", "eager"])
def test_what_is_chosen_stays(chosen: Any, tmp_path: Path) -> None:
    site = Site("bert", tmp_path)
    config = site.config(LossWeights(ce=1.0, de=1.0), attn_implementation=chosen)
    model, _ = made(config)
    tune_for_device(model, config, torch.device("cpu"), bf16=True)
    student, _, teacher = (tower.config._attn_implementation for tower in model.towers())
    assert student == (chosen or "eager")
    assert teacher == "eager"


def test_no_layer_computes_padding(tmp_path: Path) -> None:
    site = Site("modernbert", tmp_path)
    student = site.student(attn_implementation="unpadded")
    ids, mask = site.inputs("baran", "baran desel fitor goran")
    seen: list[torch.Size] = []
    for module in student.query_tower.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].shape))
    student(ids, mask, "query")
    assert {shape[:2] for shape in seen} == {(1, int(mask.sum()))}
    assert int(mask.sum()) < mask.numel()


def test_activations_of_packed_texts_are_recomputed(tmp_path: Path) -> None:
    """With the terms that keep projections, whose hooks are gone by then."""
    found = []
    for way, recompute in ((None, False), ("unpadded", True)):
        site = Site("modernbert", tmp_path)
        config = site.config(replace(EVERY_TERM, dual_reg=0.0), attn_implementation=way)
        teacher = replace(config.teacher, attn_implementation=way)
        config = replace(
            config, teacher=teacher,
            training=replace(config.training, activation_checkpointing=recompute),
        )  # fmt: skip
        model, batch = made(config)
        tune_for_device(model, config, torch.device("cpu"), bf16=False)
        model.train()(batch)["loss"].backward()
        found.append(gradients(model))
    same(*found)


@pytest.mark.parametrize("family", BACKBONES)
def test_scores_in_bf16(family: str, tmp_path: Path) -> None:
    """Every encoder and its head run; the last layer's scores are in fp32."""
    site = Site(family, tmp_path)
    teacher, (_, pairs) = site.teacher(), site.pairs()
    expected = teacher(pairs)
    convert(teacher, bf16=True)
    found = teacher(pairs)
    assert found.dtype == torch.float32
    assert not torch.equal(found.bfloat16().float(), found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def test_a_text_without_tokens_is_nothing(tmp_path: Path) -> None:
    site = Site("modernbert", tmp_path)
    ids, mask = site.inputs("baran", "baran desel fitor goran")
    mask[0] = False
    encoded = site.student(attn_implementation="unpadded")(ids, mask, "query")
    alone = site.student()(ids[1:], mask[1:], "query")
    assert encoded.tokens.isfinite().all()
    torch.testing.assert_close(encoded.vectors[1:], alone.vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_flash_attention_is_told_where_texts_end(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own path, with a stand-in of flash-attn's function for packed texts."""
    calls = []

    def varlen(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        calls.append(given)
        assert torch.equal(given["cu_seqlens_q"], given["cu_seqlens_k"])
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == 20
        assert not given["causal"]
        left, right = given.get("window_size", (-1, -1))
        assert left == right
        heads = (part.transpose(0, 1)[None] for part in (query, key, value))
        bounds = given["cu_seqlens_q"].tolist()
        return attention._text_by_text(*heads, bounds, given["softmax_scale"], left)[0]

    known = dict.fromkeys(
        ("dropout_p", "window_size", "deterministic", "max_seqlen_q", "max_seqlen_k"), True
    ) | dict.fromkeys(("softcap", "s_aux", "block_table", "cache_seqlens"), False)
    process = partial(flash._process_flash_attention_kwargs, supports_mapping=known)
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention",
        lambda *_: ((None, varlen, None, None, None), (process, None)),
    )  # fmt: skip
    site = Site(family, tmp_path)
    ids, mask = site.inputs("baran", " ".join(["desel"] * 18))
    student = site.student(dropout=0.0)
    expected = student(ids, mask, "query")
    attention.pack_texts(student.query_tower)
    student.query_tower.config._attn_implementation_internal = "flash_attention_2"
    found = student(ids, mask, "query")
    assert len(calls) == 3
    windows = [call.get("window_size") for call in calls]
    assert windows == ([None, (4, 4), None] if family == "modernbert" else [None] * 3)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.tokens[mask], expected.tokens[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reach", [-1, 4])
def test_pytorchs_attention_for_variable_lengths_takes_what_it_is_given(reach: int) -> None:
    """On tensors without contents: names, shapes and dtypes, forward and backward."""
    parts = [
        torch.empty(1, 4, 31, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    bounds = torch.empty(4, device="meta", dtype=torch.int32)
    out = attention._all_at_once(*parts, bounds, 20, 0.25, reach)
    assert out.shape == (1, 31, 4, 16)
    out.sum().backward()
    assert all(part.grad is not None and part.grad.shape == part.shape for part in parts)


def test_a_plan_needs_no_gpu_and_packs_nothing(tmp_path: Path) -> None:
    folder = str(write_backbone(tmp_path, "modernbert"))
    with without_weights():
        for chosen in ("unpadded", "flash_attention_2"):
            model = load_encoder(StudentConfig(folder, attn_implementation=chosen))
            assert model.config._attn_implementation == "sdpa"
            assert "forward" not in vars(model)


def test_attention_is_no_part_of_a_result(tmp_path: Path) -> None:
    config = Site("bert", tmp_path).config(ALL_TERMS)
    for part in ("student", "teacher"):
        changed = replace(getattr(config, part), attn_implementation="eager")
        other = replace(config, **{part: changed})
        assert fingerprint(other, "cascade", 1) == fingerprint(config, "cascade", 1)


# --- long texts ---------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return made


@pytest.mark.parametrize(("query", "passage"), [(32, 8160), (4000, 4192)])
def test_no_map_of_a_long_pair_is_held(query: int, passage: int, tmp_path: Path) -> None:
    """8,192 tokens of ModernBERT: target and term, whose map has 8,192 x 8,192 numbers a head."""
    heads, dim = 2, 8
    folder = write_backbone(
        tmp_path, "modernbert", max_position_embeddings=8192, num_hidden_layers=1,
        num_attention_heads=heads, hidden_size=heads * dim, layer_types=["full_attention"],
    )  # fmt: skip
    teacher = CrossEncoder(TeacherConfig(str(folder)), [-1]).eval()
    total = query + passage
    ids = torch.randint(5, 60, (1, total), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, total, dtype=torch.bool)
    columns = torch.arange(total)[None]
    pairs = Pairs(ids, mask, torch.zeros_like(ids), columns[:, :query], columns[:, query:])
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(1, n, 4, generator=generator) for n in (query, passage)]
    tokens[0].requires_grad_()
    with torch.no_grad():
        teacher(pairs)
    budget = 1 << 20
    with Largest() as largest:
        made = teacher.attention(pairs, budget)
    assert largest.elements <= budget < total * total // 50
    if query < 100:
        saved: list[int] = []
        masks = mask[:, :query], mask[:, query:]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            attention_kl(tokens[0], masks[0], tokens[1], masks[1], made, 1.0, "torch").backward()
        assert max(saved) <= heads * total * dim
    # The first query token's rows, as a whole.
    every = teacher._projections(-1)
    logits = torch.einsum("hd,htd->ht", every.queries[0, :, 0], every.keys[0]) / dim**0.5
    own = torch.einsum("hd,htd->ht", made.queries[0, :, 0], made.keys[0]) / dim**0.5
    shares = (own - made.lse[0, :, :1]).exp()
    torch.testing.assert_close(shares, logits.softmax(-1)[:, query:], rtol=1e-4, atol=1e-8)
