"""What is measured: this package's backends and every public alternative that is installed.

A candidate is a function of a case's inputs that returns the scores (or scores and KL). Peers that
are not installed, or that do not run on the device, are reported as such and skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import erniesearch_kernels
import torch
from erniesearch_kernels.reference import teacher_attention_map
from torch import Tensor

Inputs = dict[str, Tensor]
Candidate = Callable[[Inputs], tuple[Tensor, ...]]
TAU = 0.05


@dataclass(frozen=True)
class Case:
    """One problem size. ``group`` 0: all pairs; otherwise passages per query, its own only."""

    op: str
    num_queries: int
    query_length: int
    num_passages: int
    passage_length: int
    dim: int = 128
    dtype: str = "float32"
    group: int = 0
    heads: int = 12
    head_dim: int = 64
    goal: str = ""

    def flops(self) -> float:
        """Multiply-adds of one forward's similarities, times two."""
        pairs = self.num_queries * (self.group or self.num_passages)
        return 2.0 * pairs * self.query_length * self.passage_length * self.dim

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"forward_flops": self.flops()}


CASES = {
    "cpu_tiny": Case("maxsim", 4, 8, 8, 16, dim=32),
    "cpu_goal": Case("maxsim", 64, 32, 128, 128, goal="<= 0.25x time, <= 0.1x memory of peers"),
    "cpu_group": Case("maxsim", 32, 32, 0, 128, group=8),
    "cpu_token_kl": Case("token_kl", 16, 32, 0, 128, group=8),
    "cpu_attention_kl": Case("attention_kl", 8, 32, 0, 128, group=8),
    "gpu_a": Case("maxsim", 1024, 32, 2048, 128, dtype="bfloat16", goal="fwd+bwd <= 11.5 ms"),
    "gpu_b": Case("maxsim", 1024, 32, 8192, 180, dtype="bfloat16", goal="fwd+bwd <= 60 ms"),
    "gpu_32x300": Case("maxsim", 512, 32, 1024, 300, dtype="bfloat16"),
    "gpu_long_queries": Case("maxsim", 128, 128, 1024, 180, dtype="bfloat16"),
    "gpu_group": Case("maxsim", 1024, 32, 0, 180, dtype="bfloat16", group=8),
    "gpu_token_kl": Case("token_kl", 1024, 32, 0, 128, dtype="bfloat16", group=8),
    "gpu_attention_kl": Case("attention_kl", 256, 32, 0, 128, dtype="bfloat16", group=8),
}


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Seeded unit token vectors, and the teacher where the operation needs one."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def tokens(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1).to(device, dtype)

    passages = (case.num_queries, case.group) if case.group else (case.num_passages,)
    inputs = {
        "queries": tokens(case.num_queries, case.query_length, case.dim).requires_grad_(),
        "passages": tokens(*passages, case.passage_length, case.dim).requires_grad_(),
    }
    pairs = (case.num_queries, case.group)
    if case.op == "token_kl":
        logits = torch.randn(*pairs, case.query_length, case.passage_length, generator=generator)
        inputs["teacher_map"] = logits.softmax(-1).to(device, dtype)
    if case.op == "attention_kl":
        heads = (*pairs, case.heads)
        for name, length in (("teacher_queries", case.query_length),
                             ("teacher_keys", case.passage_length)):  # fmt: skip
            x = torch.randn(*heads, length, case.head_dim, generator=generator)
            inputs[name] = x.to(device, dtype)
    return inputs


def _ours(case: Case, backend: str, **options: Any) -> Candidate:
    def maxsim(x: Inputs) -> tuple[Tensor, ...]:
        return (erniesearch_kernels.maxsim(**x, backend=backend, **options),)

    def token_kl(x: Inputs) -> tuple[Tensor, ...]:
        return erniesearch_kernels.maxsim_token_kl(**x, tau=TAU, backend=backend)

    def attention_kl(x: Inputs) -> tuple[Tensor, ...]:
        return erniesearch_kernels.maxsim_attention_kl(**x, tau=TAU, backend=backend)

    return {"maxsim": maxsim, "token_kl": token_kl, "attention_kl": attention_kl}[case.op]


def eager(x: Inputs, *, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """What one would write: the similarity tensor, its maxima, and softmaxes over it."""
    queries, passages = x["queries"], x["passages"]
    if dtype is not None:
        queries, passages = queries.to(dtype), passages.to(dtype)
    equation = "iad,igtd->igat" if passages.dim() == 4 else "iad,jtd->ijat"
    similarity = torch.einsum(equation, queries, passages)
    scores = similarity.max(dim=-1).values.sum(-1)
    teacher = x.get("teacher_map")
    if "teacher_keys" in x:
        scale = x["teacher_keys"].shape[-1] ** -0.5
        teacher = teacher_attention_map(x["teacher_queries"], x["teacher_keys"], scale)
    if teacher is None:
        return (scores,)
    log_student = (similarity / TAU).log_softmax(-1)
    kl = (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1).mean(-1)
    return scores, kl


def _late_interaction_kernels(case: Case) -> Candidate:
    from late_interaction_kernels import MaxSimScorer

    scorer = MaxSimScorer(normalize=False)
    return lambda x: (scorer(x["queries"], x["passages"]),)


def _pylate(case: Case) -> Candidate:
    from pylate.scores import colbert_kd_scores, colbert_scores

    scores = colbert_kd_scores if case.group else colbert_scores
    return lambda x: (scores(x["queries"], x["passages"], backend="torch"),)


def _flash_maxsim(case: Case) -> Candidate:
    from flash_maxsim import flash_maxsim_batched_train

    return lambda x: (flash_maxsim_batched_train(x["queries"], x["passages"]),)


def candidates(case: Case, device: torch.device) -> dict[str, Callable[[], Candidate]]:
    """Constructors by name; a constructor or a first call may fail, which is reported."""
    cuda = device.type == "cuda"
    found: dict[str, Callable[[], Candidate]] = {}
    if cuda:
        found["erniesearch_triton"] = lambda: _ours(case, "triton")
        if case.op == "maxsim":
            found["erniesearch_triton_recompute"] = lambda: _ours(
                case, "triton", save_winners=False
            )
    found["erniesearch_torch"] = lambda: _ours(case, "torch")
    found["eager"] = lambda: eager
    if case.dtype != "float32":
        found["eager_float32"] = lambda: functools.partial(eager, dtype=torch.float32)
    found["torch_compile"] = lambda: torch.compile(eager, dynamic=False)
    if case.op == "maxsim":
        found["pylate"] = lambda: _pylate(case)
        found["late_interaction_kernels"] = lambda: _late_interaction_kernels(case)
        if not case.group:
            found["flash_maxsim"] = lambda: _flash_maxsim(case)
    return found
