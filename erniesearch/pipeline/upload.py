"""A run's export folder on the hub: its files in one commit, the card with the evaluation's results
as a model index."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from erniesearch import stages
from erniesearch.config.keys import RunConfig
from erniesearch.config.options import PushOptions
from erniesearch.errors import UserError
from erniesearch.evaluation.table import Report
from erniesearch.progress import waiting
from erniesearch.retrieval.trained import load_run_config
from erniesearch.run_folder import RunFolder

METRIC_TYPES = {"MRR": "mrr_at", "nDCG": "ndcg_at", "R": "recall_at"}
"""The hub's names of the table's metrics, ``mrr_at_10`` for MRR@10."""


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: the folder's files but the card, the card's text, and how many
    results it has."""

    repo: str
    folder: Path
    files: list[Path]
    card: str
    num_results: int

    def listing(self) -> Iterator[str]:
        """A line for each file: bytes and name in the repository."""
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size
                 for path in self.files}  # fmt: skip
        for name, size in sorted((sizes | {"README.md": len(self.card.encode())}).items()):
            yield f"{size:>14,}  {name}"


def prepare(options: PushOptions) -> Upload:
    """Read and check everything; nothing is sent.

    Raises:
        UserError: for a run without that export, and names that the hub does not take.
    """
    try:
        validate_repo_id(options.repo)
    except HFValidationError as error:
        raise UserError(f"--repo {options.repo}: {' '.join(str(error).split())}") from None
    if options.repo.count("/") != 1:
        raise UserError(f"--repo {options.repo}: OWNER/NAME, the owner a user or an organisation")
    config = load_run_config(options.run)
    exports = RunFolder(config.run_dir).export(options.export).parent
    folder = exports / options.export
    there = sorted(path.parent.name for path in exports.glob("*/README.md"))
    if options.export not in there:
        known = f"there are {', '.join(there)}" if there else "`erniesearch export` makes them"
        raise UserError(f"--export {options.export}: not in {exports}; {known}")
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "README.md"]
    card = ModelCard.load(folder / "README.md")
    results = list(eval_results(config, options.export, card.text))
    if results:
        card.data.model_name = options.repo.rsplit("/", 1)[1]
        card.data.eval_results = results
    if options.license is not None:
        card.data.license = options.license
    return Upload(options.repo, folder, files, str(card), len(results))


def eval_results(config: RunConfig, export: str, card: str) -> Iterator[EvalResult]:
    """The export's row of the run's table, if the card has that table: one with other models' has
    not."""
    root = RunFolder(config.run_dir).root
    if not (root / "evaluation.json").is_file():
        return
    report = Report.load(root)
    if report.table().strip() not in card:
        return
    kind = re.sub(r"_(query|passage)$", "", export)
    name = f"dual_encoder-{stages.final_student(config)}" if kind == "dual_encoder" else kind
    about = "" if kind == "dual_encoder" else (
        f", reranking the dual-encoder's top {report.rerank_depth}")  # fmt: skip
    row = next((row for row in report.rows if Path(row.run_file).stem == name), None)
    for metric, estimate in row.metrics.items() if row else ():
        base, _, depth = metric.partition("@")
        yield EvalResult(
            task_type="text-retrieval", task_name=f"passage retrieval{about}",
            dataset_type=re.sub(r"[^\w.-]+", "-", report.dataset), dataset_name=report.dataset,
            dataset_split=report.split, metric_type=f"{METRIC_TYPES.get(base, base)}_{depth}",
            metric_name=metric, metric_value=round(estimate.mean, 6),
            metric_args={"interval_95": [round(estimate.low, 6), round(estimate.high, 6)],
                         "queries": report.num_queries, "passages": report.num_passages},
        )  # fmt: skip


def push(upload: Upload, options: PushOptions) -> str:
    """Make the repository and its branch if need be, and commit; returns the commit's address.

    Raises:
        UserError: without a token, offline, and for what the hub refuses.
    """
    if get_token() is None:
        raise UserError("no token of the hub: `hf auth login` keeps one, or set HF_TOKEN")
    api = HfApi(library_name="erniesearch")
    additions = [
        CommitOperationAdd(path.relative_to(upload.folder).as_posix(), path)
        for path in sorted(upload.files)
    ]
    additions.append(CommitOperationAdd("README.md", upload.card.encode()))
    try:
        api.create_repo(upload.repo, private=options.private or None, exist_ok=True)
        if options.revision is not None:
            api.create_branch(upload.repo, branch=options.revision, exist_ok=True)
        with waiting(f"sending {len(additions)} files"):
            commit = api.create_commit(
                upload.repo, additions, commit_message=options.message, revision=options.revision
            )
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push") from None
    except HfHubHTTPError as error:
        told = " ".join(str(error.server_message or error).split())
        status = error.response.status_code
        raise UserError(f"{api.endpoint} answers {status} about {upload.repo}: {told}") from None
    except (HTTPError, OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{upload.repo} cannot be pushed to {api.endpoint}: {told}") from None
    return str(commit.commit_url)
