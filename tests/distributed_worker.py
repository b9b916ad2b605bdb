"""Started by tests on every rank: trains the stages whose configs lie in a JSON file."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from erniesearch.config import RunConfig, from_dict
from erniesearch.training.loop import train_stage

if __name__ == "__main__":
    for stage, config in json.loads(Path(sys.argv[1]).read_text()):
        train_stage(from_dict(RunConfig, config), stage)
    dist.destroy_process_group()
