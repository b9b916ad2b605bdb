"""``push``: a run's model to the hub."""

import sys

from erniesearch.commands.parsing import command_parser, name_accelerator, parse_options
from erniesearch.config.options import PushOptions


def push_command(argv: list[str]) -> int:
    """``erniesearch push --run DIR --repo OWNER/NAME``."""
    parser = command_parser(
        "push", "Put a folder of a run's exports/ on the Hugging Face hub (or HF_ENDPOINT): its"
        " files in one commit, its model card with the evaluation's results. The token is the one"
        " of `hf auth login`, or HF_TOKEN.",
    )  # fmt: skip
    options, _ = parse_options(
        parser, argv, PushOptions, switches=("private", "dry_run"), at_least={}
    )
    name_accelerator()
    from erniesearch.pipeline.upload import prepare, push

    upload = prepare(options)
    for line in upload.listing():
        sys.stdout.write(f"{line}\n")
    told = f"{upload.num_results} results in the card"
    if not upload.num_results:
        told = "no results in the card: the run has not evaluated these models"
    if options.dry_run:
        sys.stdout.write(f"{told}; nothing is sent\n")
        return 0
    sys.stdout.write(f"{told}; {push(upload, options)}\n")
    return 0
