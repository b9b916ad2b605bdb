"""Started by tests on every rank: trains the stages whose configs lie in a JSON file."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from support.unvalidated import train as train_stage

from erniesearch import exiting
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict


def main() -> None:
    for stage, config in json.loads(Path(sys.argv[1]).read_text()):
        train_stage(from_dict(RunConfig, config), stage)
    dist.destroy_process_group()


if __name__ == "__main__":
    exiting.run(main)
