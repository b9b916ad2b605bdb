"""Passages are on their way to the other ranks while the teacher reads its pairs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import EVERY_TERM, ConfigMaker

from erniesearch import distributed
from erniesearch.data.collection import load_beir
from erniesearch.planning.accounting import fake_world
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model
from erniesearch.training.gradient_cache import cached_backward

RANKS = 3


class Recorded:
    """A collective's handle that says when it is waited for."""

    def __init__(self, work: Any, name: str, events: list[str]) -> None:
        self.work, self.name, self.events = work, name, events

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")
        self.work.wait()


def recorded(
    events: list[str], gather: Callable[..., Any]
) -> Callable[[torch.Tensor, torch.Tensor, bool], Recorded]:
    """The all-gather, with the shape of a rank's rows noted where it starts."""

    def start(out: torch.Tensor, rows: torch.Tensor, async_op: bool) -> Recorded:
        assert async_op
        name = f"{str(rows.dtype).removeprefix('torch.')} {list(rows.shape[1:])}"
        events.append(f"send {name}")
        out.view(RANKS, -1).copy_(rows.reshape(1, -1))  # the fake group leaves it as it was
        return Recorded(gather(out, rows, async_op=True), name, events)

    return start


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_gathers_start_before_the_teacher_and_are_awaited_after_it(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, chunk_size: int | None, exchange: str
) -> None:
    config = make_config(queries_per_rank=2, weights=EVERY_TERM, late_interaction_exchange=exchange)
    stage = Stage(config, "cascade")
    model, tokenizer = build_model(stage)
    assert model.student is not None
    assert model.teacher is not None
    events: list[str] = []
    monkeypatch.setattr(distributed, "_all_gather", recorded(events, distributed._all_gather))
    model.student.register_forward_hook(lambda *_: events.append("student"))
    model.teacher.register_forward_pre_hook(lambda *_: events.append("teacher"))
    monkeypatch.setattr(
        "erniesearch.objectives.scores.ring_scores",
        lambda score, queries, passages, gather: score(
            queries, *[torch.cat([x] * RANKS) for x in (passages, gather.mask_on_cpu)]
        ),
    )
    with fake_world(RANKS, "cuda"):
        batch = build_batches(stage, load_beir(config.data.path, "train"), tokenizer)[0]
        if chunk_size:
            cached_backward(model.train(), model, torch.Tensor.backward, batch, chunk_size)
        else:
            model.train()(batch)["loss"].backward()
    student, teacher = events.index("student"), events.index("teacher")
    hidden, dim = model.student.hidden_size, config.student.late_interaction_dim
    vectors, tokens = f"float32 [{hidden}]", f"float32 [{dim}]"
    # Known before the student begins: the positions, and the lengths where tokens are compared.
    assert set(events[:student]) == {"send int64 []", f"send int64 [{len(batch.passage_ids)}]"}
    sent = events[student:teacher]
    assert sent.count(f"send {vectors}") == 2, "either dropout pass"
    assert sent.count(f"send {tokens}") == (exchange == "all_gather")
    after = [event for event in events[teacher:] if event.startswith("send")]
    assert not [event for event in after if event in (f"send {vectors}", f"send {tokens}")]
    awaited = [event for event in events[:teacher] if event.startswith("wait")]
    # The other ranks' lengths say how many tokens to make room for; the ring asks for them later.
    assert awaited == [f"wait int64 [{len(batch.passage_ids)}]"] * (exchange == "all_gather")
