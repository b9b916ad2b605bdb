"""Entry for launchers: ``deepspeed --num_gpus N launch/train.py --config FILE --stage NAME``."""

import sys

from erniesearch.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
