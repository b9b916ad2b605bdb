"""Started by test_plan.py on every rank: bytes that two updates really send, by kind.

Usage: wire_worker.py JOB.json OUT.json
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erniesearch import distributed, exiting
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.models.backbone import without_weights
from erniesearch.planning.accounting import COLLECTIVES, bytes_sent
from erniesearch.planning.trial import full_batches
from erniesearch.stages import Stage
from erniesearch.training.build import assemble_model, base_teacher
from erniesearch.training.engine import build_engine
from erniesearch.training.update import update


class Count(TorchDispatchMode):
    """Adds up what passes through torch's process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = COLLECTIVES.get(func._schema.name.removeprefix("c10d::"))
        if kind and func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            whole = max(x.numel() * x.element_size() for x in tensors)
            self.sent[kind] += bytes_sent(kind, whole, dist.get_world_size())
        return func(*args, **(kwargs or {}))


def main(job_file: str, out: str) -> None:
    device, found = distributed.initialize(), []
    for job in json.loads(Path(job_file).read_text()):
        config: RunConfig = from_dict(RunConfig, job)
        stage = config.stages.cascade
        with without_weights():
            model, tokenizer = assemble_model(
                Stage(config, "cascade"), config.student, base_teacher(config)
            )
        engine, _ = build_engine(model, config.training, stage, stage.queries_per_rank, False)
        engine.train()
        batches = full_batches(Stage(config, "cascade"), stage.queries_per_rank, tokenizer)
        for _ in range(3):  # ZeRO-3 gathers more often until it has recorded what is used when
            with Count() as count:
                update(engine, batches, stage, device, lambda what: None)
        found.append(count.sent)
        engine.destroy()
    if distributed.is_main():
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    exiting.run(lambda: main(*sys.argv[1:]))
