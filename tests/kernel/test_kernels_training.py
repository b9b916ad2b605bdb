"""A training with the fused operations has the loss trace of one that holds every similarity."""

from collections.abc import Iterator

import pytest
import torch
from support.tiny import ConfigMaker

from erniesearch.data.collection import load_beir
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model

STEPS = 100


def loss_trace(make_config: ConfigMaker, kernels: str, device: str) -> Iterator[dict[str, float]]:
    """Every term of all of ERNIE-Search's over ``STEPS`` updates of a tiny model, fp32."""
    config = make_config(steps=STEPS, kernels=kernels, dropout=0.0, tau_att=0.1, tau_de=0.5)
    model, tokenizer = build_model(Stage(config, "cascade"))
    data = load_beir(config.data.path, config.data.train_split)
    batches = build_batches(Stage(config, "cascade"), data, tokenizer)
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(STEPS):
        terms = model(batches[step].to(torch.device(device)))
        optimizer.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield {name: float(value.detach()) for name, value in terms.items()}


@pytest.mark.parametrize(
    ("kernels", "device"),
    [("torch", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.cuda)],
)
def test_hundred_steps_as_with_eager(make_config: ConfigMaker, kernels: str, device: str) -> None:
    # SGD: Adam would scale the rounding noise of near-zero gradients up to whole updates.
    expected = list(loss_trace(make_config, "eager", device))
    trace = list(loss_trace(make_config, kernels, device))
    assert len(trace) == len(expected) == STEPS
    assert expected[-1]["loss"] < 0.8 * expected[0]["loss"]  # it trains
    assert {"li", "attention", "ce_to_li", "li_to_de"} <= expected[0].keys()
    for step, (own, wanted) in enumerate(zip(trace, expected, strict=True)):
        for name, value in wanted.items():
            if not name.startswith("accuracy"):  # a step function: rounding decides near ties
                assert own[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, step)
