"""What the families of encoders do differently: positions, attention, layers, precision."""

from pathlib import Path

import pytest
import torch
from support.backbones import BACKBONES, write_backbone
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from erniesearch.config.keys import StudentConfig, TeacherConfig
from erniesearch.data.batches import encode_texts
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import CrossEncoder, PairLayout, Pairs, assemble_pairs

QUERIES = ["baran desel", "fitor"]
PASSAGES = ["govix kuwen lazul", "mipat", "nohod baran desel fitor", "govix"]
REBUILT = [family for family in BACKBONES if family not in ("convbert", "deberta-v2")]


def assembled(folder: Path, longest: int = 16) -> tuple[Tensor, Pairs]:
    """The pairs, and the mask of their passages."""
    tokenizer = load_tokenizer(StudentConfig(str(folder)))
    query = encode_texts(tokenizer, QUERIES, longest)
    passage = encode_texts(tokenizer, PASSAGES, longest)
    layout = PairLayout.of(tokenizer)
    return passage[1], assemble_pairs(*query, *passage, layout, int(tokenizer.pad_token_id))


def eager_maps(folder: Path, model: CrossEncoder, pairs: Pairs) -> tuple[Tensor, ...]:
    """The model's own attention maps ``[N, heads, L, L]``, layer by layer."""
    eager = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, attn_implementation="eager"
    ).eval()
    eager.load_state_dict(model.model.state_dict())
    types = {"token_type_ids": pairs.token_type_ids} if model.uses_token_types else {}
    output = eager(
        input_ids=pairs.input_ids, attention_mask=pairs.mask.long(), output_attentions=True, **types
    )
    scores = model(pairs)
    torch.testing.assert_close(scores, output.logits.squeeze(-1), rtol=1e-5, atol=1e-5)
    return output.attentions


@pytest.mark.parametrize("family", REBUILT)
def test_attention_equals_the_eager_map(family: str, tmp_path: Path) -> None:
    folder = write_backbone(tmp_path, family)
    passage_mask, pairs = assembled(folder)
    model = CrossEncoder(TeacherConfig(str(folder)), attention_layers=[-1, 0]).eval()
    maps = eager_maps(folder, model, pairs)
    assert maps[-1].std() > 0.05  # it looks somewhere
    attention = model.attention(pairs, budget=100)
    logits = attention.queries @ attention.keys.mT / attention.queries.shape[-1] ** 0.5
    ours = (logits - attention.lse[..., None]).exp().mean(1)  # [N, Lq, Lp], head mean
    torch.testing.assert_close(model.attention(pairs).lse, attention.lse)
    for n in range(len(ours)):
        rows, columns = pairs.query_columns[n], pairs.passage_columns[n][passage_mask[n]]
        expected = maps[-1].mean(1)[n][rows][:, columns]
        real = pairs.mask[n][rows]
        torch.testing.assert_close(
            ours[n][real][:, passage_mask[n]], expected[real], rtol=0, atol=1e-5
        )
    for layer in (0, -1):  # head by head, in both directions
        of_query, of_passage = model.sides(pairs, layer)
        for rows, columns, first, second in (
            (pairs.query_columns, pairs.passage_columns, of_query.queries, of_passage.keys),
            (pairs.passage_columns, pairs.query_columns, of_passage.queries, of_query.keys),
        ):
            logits = first @ second.mT / first.shape[-1] ** 0.5
            for n in range(len(logits)):
                real, there = (pairs.mask[n][index[n]] for index in (columns, rows))
                own = logits[n][:, there][..., real].softmax(-1)
                expected = maps[layer][n][:, rows[n][there]][:, :, columns[n][real]]
                expected = expected / expected.sum(-1, keepdim=True)
                torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def test_attention_of_another_form_is_refused(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path / "deberta", "deberta-v2")
    with pytest.raises(UserError, match=r"deberta-v2\) cannot give attention.*distance.*bert, ernie"):
        CrossEncoder(TeacherConfig(str(folder)), attention_layers=[-1])
    folder = write_backbone(tmp_path / "convbert", "convbert")
    with pytest.raises(UserError, match=r"convbert\) cannot give attention.*weights.attention"):
        CrossEncoder(TeacherConfig(str(folder)), attention_layers=[-1])


def test_a_window_is_no_target(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path, "modernbert")
    message = r"layer 1 of the teacher .* attends to a window of 4 tokens.*\(\[0, 2\]\)"
    with pytest.raises(UserError, match=message):
        CrossEncoder(TeacherConfig(str(folder)), attention_layers=[-1, 1])
