"""Models of the Hugging Face hub as folders on this machine."""

from functools import lru_cache

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from erniesearch.errors import UserError
from erniesearch.progress import waiting

FILES = ["*.json", "*.txt", "*.model", "*.py", "*artifact.metadata"]
"""What is read of a repository besides *.safetensors; weights in other forms stay there."""
NOT_READ = ["onnx/*", "openvino/*", "coreml/*", "*.msgpack"]


@lru_cache
def from_hub(name: str, revision: str | None = None, weights: bool = True) -> str:
    """The folder of a repository's snapshot, downloaded unless it is there.

    Args:
        name: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        revision: branch, tag or commit; None is the name's, or the main branch.
        weights: False leaves the weights there.

    Raises:
        UserError: if there is no such repository or revision, or the hub cannot be reached.
    """
    name, _, own = name.partition("@")
    if own and revision:
        raise UserError(
            f"model '{name}@{own}': revision {revision} is given besides: leave one out"
        )
    revision = revision or own or None
    at = f" at {revision}" if revision else ""
    try:
        with waiting(f"fetching {name} from the hub"):
            return snapshot_download(
                name, revision=revision, allow_patterns=FILES + ["*.safetensors"] * weights,
                ignore_patterns=NOT_READ,
            )  # fmt: skip
    except LocalEntryNotFoundError:
        problem = "it is not in the cache and the hub cannot be reached"
    except (HTTPError, HFValidationError, OSError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(
        f"model '{name}'{at}: no such folder, and from the hub: {problem}; download it where there"
        f" is a connection (hf download {name} --local-dir DIR) and name DIR"
    )
