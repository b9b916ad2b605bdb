"""Each loss term against a value computed by hand on a 2 x 3 example."""

import math

import pytest
import torch

from erniesearch.objectives.losses import (
    accuracy,
    contrastive_loss,
    kl_divergence,
    kl_statistics,
    margin_mse,
    margin_statistics,
    symmetric_kl,
)
from erniesearch.objectives.outputs import TeacherAttention
from erniesearch.objectives.scores import (
    attention_kl,
    candidate_mask,
    dual_encoder_scores,
    late_interaction_scores,
    own_group,
)

# Two queries, three passages, chosen so that softmaxes are rational: exp gives 1, 2, 4 and so on.
LOGITS = torch.tensor([[1.0, 2.0, 1.0], [4.0, 2.0, 2.0]]).log()
OTHER = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]).log()
KEEP = torch.tensor([[True, True, False], [True, False, True]])


def test_contrastive_loss_by_hand() -> None:
    # -log(2/4) and -log(2/8)
    expected = (math.log(2) + math.log(4)) / 2
    assert contrastive_loss(LOGITS, torch.tensor([1, 2])).item() == pytest.approx(expected)


def test_contrastive_loss_leaves_masked_candidates_out() -> None:
    # -log(2/3) and -log(2/6)
    expected = (math.log(3 / 2) + math.log(3)) / 2
    loss = contrastive_loss(LOGITS, torch.tensor([1, 2]), KEEP)
    assert loss.item() == pytest.approx(expected)


def test_kl_by_hand() -> None:
    # P_t = (1,2,1)/4, (4,2,2)/8;  P_s = (2,1,1)/4, (1,1,2)/4
    first = 0.25 * math.log(0.5) + 0.5 * math.log(2) + 0
    second = 0.5 * math.log(2) + 0 + 0.25 * math.log(0.5)
    assert kl_divergence(LOGITS, OTHER).item() == pytest.approx((first + second) / 2)


def test_kl_with_mask_renormalises_both_sides() -> None:
    # P_t = (1,2)/3, (4,2)/6;  P_s = (2,1)/3, (1,2)/3
    row = 1 / 3 * math.log(0.5) + 2 / 3 * math.log(2)
    assert kl_divergence(LOGITS, OTHER, KEEP).item() == pytest.approx(row)


def test_symmetric_kl_is_half_the_sum_of_both_directions() -> None:
    expected = 0.5 * (kl_divergence(LOGITS, OTHER) + kl_divergence(OTHER, LOGITS))
    assert symmetric_kl(LOGITS, OTHER).item() == pytest.approx(expected.item())


def test_kl_target_is_detached_unless_asked() -> None:
    for detach in (True, False):
        target = LOGITS.clone().requires_grad_()
        student = OTHER.clone().requires_grad_()
        kl_divergence(target, student, KEEP, detach).backward()
        assert (target.grad is None) == detach
        # d KL / d student logits = (P_s - P_t) / rows, 0 where masked
        expected = torch.tensor([[1 / 6, -1 / 6, 0], [-1 / 6, 0, 1 / 6]])
        torch.testing.assert_close(student.grad, expected)


STUDENT = torch.tensor([[3.0, 1.0, 0.0, 9.0], [0.5, 2.0, -1.0, 1.0]])
TEACHER = torch.tensor([[5.0, 4.0, 0.0, -9.0], [1.0, 1.0, 0.5, 0.0]])
SCORED = torch.tensor([[True, True, True, False], [True, True, True, True]])


def test_margin_mse_by_hand() -> None:
    # Margins of the student (2, 3, -6) and (-1.5, 1.5, -0.5), of the teacher (1, 5, 14) and
    # (0, 0.5, 1): differences (1, -2, -20) and (-1.5, 1, -1.5).
    expected = ((1 + 4 + 400) / 3 + (2.25 + 1 + 2.25) / 3) / 2
    assert margin_mse(TEACHER, STUDENT).item() == pytest.approx(expected)
    # Hofstätter et al. take the mean over triples, of which every query has as many here.
    triples = torch.nn.functional.mse_loss(
        (STUDENT[:, :1] - STUDENT[:, 1:]).flatten(), (TEACHER[:, :1] - TEACHER[:, 1:]).flatten()
    )
    torch.testing.assert_close(margin_mse(TEACHER, STUDENT), triples)


def test_margin_mse_leaves_masked_candidates_out() -> None:
    expected = ((1 + 4) / 2 + (2.25 + 1 + 2.25) / 3) / 2
    wild = TEACHER.masked_fill(~SCORED, 1e30)
    assert margin_mse(wild, STUDENT, SCORED).item() == pytest.approx(expected)
    alone = SCORED.clone()
    alone[1, 1:] = False  # nothing to compare the second positive with
    assert margin_mse(wild, STUDENT, alone).item() == pytest.approx((1 + 4) / 2 / 2)


def test_margin_mse_does_not_see_a_constant_and_its_gradient() -> None:
    student, target = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    shifted = target + torch.tensor([[7.0], [-3.0]])
    loss = margin_mse(shifted, student + 2.0, SCORED)
    loss.backward()
    assert target.grad is None
    # d/d s(p) = -2 (M_s - M_t) / (negatives · queries), and the positive's is minus their sum.
    expected = torch.tensor([[-1.0, -1.0, 2.0, 0.0], [-2.0, 1.5, -1.0, 1.5]])
    expected[0] /= 2
    expected[1] /= 3
    torch.testing.assert_close(student.grad, expected)
    margin_mse(target, student, SCORED, detach=False).backward()
    torch.testing.assert_close(target.grad, -expected)


def test_sizes_of_margins_by_hand() -> None:
    found = margin_statistics(TEACHER, STUDENT, SCORED)
    assert found["target_margin"].item() == pytest.approx((3 + 0.5) / 2)
    assert found["student_margin"].item() == pytest.approx((2.5 + 3.5 / 3) / 2)


def test_margins_in_bf16_are_taken_in_fp32() -> None:
    low = torch.tensor([[256.0, 255.0]], dtype=torch.bfloat16)
    assert margin_mse(torch.tensor([[0.5, 0.0]]), low).item() == 0.25
    assert margin_mse(torch.tensor([[0.5, 0.0]]), low).dtype == torch.float32


def test_gradients_are_finite_where_everything_but_the_positive_is_masked() -> None:
    student = OTHER.clone().requires_grad_()
    mask = torch.tensor([[True, False, False], [False, True, False]])
    labels = torch.tensor([0, 1])
    loss = contrastive_loss(student, labels, mask) + symmetric_kl(student, LOGITS, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(student.grad, torch.zeros_like(student.grad))


def test_accuracy_counts_the_positive_on_top() -> None:
    assert accuracy(LOGITS, torch.tensor([1, 2])).item() == 0.5
    assert accuracy(LOGITS, torch.tensor([1, 2]), KEEP[[0, 1]].roll(1, 0)).item() == 0.0


def test_dual_encoder_scores_divide_by_the_temperature() -> None:
    queries = torch.tensor([[1.0, 2.0]])
    passages = torch.tensor([[3.0, 1.0], [0.0, -1.0]])
    assert dual_encoder_scores(queries, passages, 0.5).tolist() == [[10.0, -4.0]]


@pytest.mark.parametrize("kernels", ["torch", "eager"])
def test_late_interaction_scores_by_hand(kernels: str) -> None:
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    query_mask = torch.tensor([[True, True, False]])
    passages = torch.tensor([[[0.5, -0.2], [0.1, 0.7]], [[-1.0, -1.0], [9.0, 9.0]]])
    passage_mask = torch.tensor([[True, True], [True, False]])
    scores = late_interaction_scores(queries, query_mask, passages, passage_mask, 2.0, kernels)
    # (0.5 + 0.7) / 2;  a masked token wins nothing, even against negative similarities
    torch.testing.assert_close(scores, torch.tensor([[0.6, -1.0]]))


@pytest.mark.parametrize("kernels", ["torch", "eager"])
def test_attention_kl_by_hand(kernels: str) -> None:
    """One head, one query token of content, two passage tokens, tau 1."""
    # Student: similarities log 1 and log 3, so softmax (1, 3)/4.
    query_tokens = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    query_mask = torch.tensor([[False, True]])
    passage_tokens = torch.tensor([[[5.0, 0.0], [0.0, 0.0], [math.log(3), 0.0]]])
    passage_mask = torch.tensor([[False, True, True]])
    # Teacher: attention proportional to 2 and 1 on the passage's tokens; the log-sum-exp of the
    # whole row covers more than these two, which must cancel in the renormalisation.
    teacher_queries = torch.tensor([[[[0.0], [1.0]]]])
    teacher_keys = torch.tensor([[[[7.0], [math.log(2)], [0.0]]]])
    teacher_lse = torch.tensor([[[1.0, math.log(10)]]])
    value = attention_kl(
        query_tokens, query_mask, passage_tokens, passage_mask,
        TeacherAttention(teacher_queries, teacher_keys, teacher_lse), 1.0, kernels,
    )  # fmt: skip
    expected = 2 / 3 * math.log((2 / 3) / (1 / 4)) + 1 / 3 * math.log((1 / 3) / (3 / 4))
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kernels", ["torch", "eager"])
def test_attention_kl_averages_heads_before_cutting(kernels: str) -> None:
    """Two heads of which one hardly looks at the passage: it must weigh little."""
    query_tokens = torch.tensor([[[1.0, 0.0]]])
    passage_tokens = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])  # uniform student
    masks = torch.tensor([[True]]), torch.tensor([[True, True]])
    teacher_queries = torch.ones(1, 2, 1, 1)
    teacher_keys = torch.tensor([[[[math.log(3)], [0.0]], [[0.0], [math.log(3)]]]])
    # Head 0 pays the passage 4/8 = 3/8 + 1/8, head 1 pays it 4/80 = 1/80 + 3/80.
    teacher_lse = torch.tensor([[[math.log(8)], [math.log(80)]]])
    value = attention_kl(
        query_tokens, masks[0], passage_tokens, masks[1],
        TeacherAttention(teacher_queries, teacher_keys, teacher_lse), 1.0, kernels,
    )  # fmt: skip
    mass = torch.tensor([3 / 8 + 1 / 80, 1 / 8 + 3 / 80])
    target = mass / mass.sum()
    assert value.item() == pytest.approx((target * (target / 0.5).log()).sum().item(), rel=1e-5)


def test_false_negatives_are_masked_and_the_positive_stays() -> None:
    relevant = torch.tensor([[7, -1], [3, 5]])
    passage_index = torch.tensor([7, 2, 3, 5, 7, 4])
    labels = torch.tensor([0, 2])
    mask = candidate_mask(relevant, passage_index, labels)
    # Query 0: the second copy of passage 7 goes. Query 1: passage 5, relevant too, goes.
    assert mask.tolist() == [
        [True, True, True, True, False, True],
        [True, True, True, False, True, True],
    ]


def test_own_group_starts_at_the_label() -> None:
    scores = torch.arange(12.0).view(2, 6)
    assert own_group(scores, torch.tensor([0, 3]), 3).tolist() == [[0, 1, 2], [9, 10, 11]]


def test_kl_statistics_by_hand() -> None:
    target, student = LOGITS, OTHER
    values = kl_statistics(target, student)
    # Probabilities (1, 2, 1)/4 and (4, 2, 2)/8; (2, 1, 1)/4 and (1, 1, 2)/4.
    assert values["target_top1"].item() == pytest.approx(1 / 2)
    assert values["target_entropy"].item() == pytest.approx(1.5 * math.log(2))
    assert values["student_top1"].item() == pytest.approx(1 / 2)
    assert values["student_entropy"].item() == pytest.approx(1.5 * math.log(2))
    values = kl_statistics(target, student, KEEP)
    # Masked: (1, 2)/3 and (4, 2)/6; (2, 1)/3 and (1, 2)/3.
    thirds = math.log(3) - 2 / 3 * math.log(2)
    for name, value in values.items():
        expected = 2 / 3 if name.endswith("top1") else thirds
        assert value.item() == pytest.approx(expected), name
    assert list(values) == ["target_top1", "target_entropy", "student_top1", "student_entropy"]


def test_scores_and_candidates_of_every_querys_own_group() -> None:
    queries = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    passages = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 2.0]]])
    assert dual_encoder_scores(queries, passages, 0.5).tolist() == [[2.0, 4.0], [4.0, 8.0]]
    tokens = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    masks = torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 2, 1, dtype=torch.bool)
    late = late_interaction_scores(tokens, masks[0], passages[:, :, None], masks[1], 0.5)
    assert late.tolist() == [[2.0, 0.0], [2.0, 4.0]]
    index = torch.tensor([[7, 3], [5, 6]])
    relevant = torch.tensor([[7, 3], [5, -1]])
    mask = candidate_mask(relevant, index, torch.tensor([0, 0]))
    assert mask.tolist() == [[True, False], [True, True]]
