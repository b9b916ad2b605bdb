"""Entry for launchers: ``deepspeed --num_gpus N launch/encode.py --model … --data … --out …``."""

import sys

from erniesearch.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
