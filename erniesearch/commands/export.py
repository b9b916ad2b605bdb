"""``export``: a finished run's models for other libraries."""

import sys

from erniesearch.commands.parsing import command_parser, name_accelerator


def export_command(argv: list[str]) -> int:
    """``erniesearch export --run DIR [--onnx]``."""
    parser = command_parser(
        "export", "Write a run's models to its exports/ again, with model cards; `erniesearch"
        " run` has done so already, without ONNX.",
    )  # fmt: skip
    parser.add_argument("--run", type=str, required=True, help="Folder of a finished run.")
    parser.add_argument(
        "--onnx", action="store_true",
        help="Also write the dual-encoder's transformer as onnx/model.onnx, compared with PyTorch"
        " (extra onnx).",
    )  # fmt: skip
    settings = parser.parse_args(argv)
    name_accelerator()
    from erniesearch.pipeline.run import export_run
    from erniesearch.retrieval.trained import load_run_config

    for folder in export_run(load_run_config(settings.run), settings.onnx):
        sys.stdout.write(f"{folder}\n")
    return 0
