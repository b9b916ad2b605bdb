"""``convert …``: other libraries' weights into folders that this one reads."""

import sys
from pathlib import Path

from erniesearch.commands.parsing import command_parser, name_accelerator, require_at_least
from erniesearch.errors import UserError


def paddle_command(argv: list[str]) -> int:
    """``erniesearch convert paddle SOURCE --out DIR``."""
    parser = command_parser(
        "convert paddle", "Convert ERNIE weights of PaddleNLP (model_state.pdparams) into a folder"
        " for transformers and sentence-transformers. Nothing in the file is executed.",
    )  # fmt: skip
    parser.add_argument(
        "source", type=str,
        help="The .pdparams file or its folder; config.json and vocab.txt beside it are used.",
    )  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="Folder to write; must not exist.")
    parser.add_argument("--kind", type=str, default="dual_encoder",
                        help="dual_encoder or cross_encoder.")  # fmt: skip
    parser.add_argument(
        "--prefix", type=str, default="",
        help="Take the tensors whose names begin so, where a file holds two towers, e.g."
        " query_ernie. or title_ernie.",
    )  # fmt: skip
    parser.add_argument("--vocab", type=str | None, default=None,
                        help="vocab.txt, if it does not lie beside the weights.")  # fmt: skip
    parser.add_argument("--max_length", type=int, default=128,
                        help="Longest input in tokens, told to the libraries.")  # fmt: skip
    for name, kind, text in _OVERRIDES:
        parser.add_argument(f"--{name}", type=kind | None, default=None, help=f"{text}.")
    settings = parser.parse_args(argv)
    if settings.kind not in ("dual_encoder", "cross_encoder"):
        raise UserError(f"--kind {settings.kind}: dual_encoder or cross_encoder")
    require_at_least(settings, {"max_length": 3})
    name_accelerator()
    from erniesearch.export.paddle import Overrides, convert_paddle

    converted = convert_paddle(
        Path(settings.source), Path(settings.out), settings.kind, settings.prefix,
        Path(settings.vocab) if settings.vocab else None, settings.max_length,
        Overrides(**{name: getattr(settings, name) for name, *_ in _OVERRIDES}),
    )  # fmt: skip
    config = converted.config
    sys.stdout.write(
        f"{converted.folder}: {config.num_hidden_layers} layers, hidden {config.hidden_size},"
        f" {config.num_attention_heads} heads, {config.hidden_act}, vocabulary"
        f" {config.vocab_size}, LayerNorm epsilon {config.layer_norm_eps}\n"
    )
    if converted.left_out:
        sys.stdout.write(f"left out: {', '.join(converted.left_out)}\n")
    return 0


_OVERRIDES = (
    ("num_attention_heads", int, "Attention heads, which the shapes do not show"),
    ("hidden_act", str, "Activation of the feed-forward layers: gelu or relu"),
    ("layer_norm_eps", float, "LayerNorm's epsilon; 1e-5 for RocketQAv2's weights"),
    ("hidden_dropout_prob", float, "Dropout of the hidden states in training"),
    ("attention_probs_dropout_prob", float, "Dropout of the attention in training"),
    ("pad_token_id", int, "Id of [PAD]"),
    ("do_lower_case", bool, "Whether the tokenizer lowers its input"),
)
