"""``erniesearch run``: every stage in order, each skipped when its result is there and its inputs
are unchanged; then export, index, evaluate, report."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from erniesearch import stages
from erniesearch.config.keys import TRAINING_STAGES, RunConfig, training_stages
from erniesearch.data.bm25 import check_analyzer
from erniesearch.data.collection import RetrievalData, load_beir, with_split
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.data.memory import with_data
from erniesearch.errors import UserError
from erniesearch.evaluation.measures import evaluation_subset
from erniesearch.evaluation.table import Report, table_console
from erniesearch.export import export_all
from erniesearch.files import hold_lock
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.start import read_start
from erniesearch.pipeline import launcher
from erniesearch.progress import begin, say
from erniesearch.report.watch import write_report
from erniesearch.retrieval.vector_index import check_search
from erniesearch.run_folder import RunFolder, is_done
from erniesearch.training.build import check_inputs
from erniesearch.training.epochs import resolve_epochs
from erniesearch.training.faults import preemption
from erniesearch.training.trackers import check_trackers

STAGE_NAMES = (*TRAINING_STAGES, "teacher_check", "mine")


Launch = Callable[[RunConfig, str, int], None]


def run(
    config: RunConfig, data: RetrievalData | None = None, *, only: Sequence[str] = ()
) -> Report | None:
    """``erniesearch run`` from Python: its steps are processes that it starts.

    Args:
        data: the collection, if it is not the folder that ``data.path`` names; for the table it
            needs the split ``evaluation.split`` too.
        only: steps of :data:`stages.ORDER`, all that the config enables by default.

    Returns:
        The table, None if ``only`` leaves the step ``evaluate`` out.

    Raises:
        UserError, StageFailed, Preempted: as :func:`run_pipeline`.
    """
    config = with_data(config, data)
    main = threading.current_thread() is threading.main_thread()  # the one that gets signals
    with preemption.listening(launcher.stop) if main else nullcontext():
        run_pipeline(config, list(only))
    return Report.load(Path(config.run_dir)) if "evaluate" in (only or stages.ORDER) else None


def run_pipeline(
    config: RunConfig, only: list[str] | None = None, launch: Launch = launcher.launch
) -> None:
    """Run the pipeline.

    Args:
        only: run just these steps of :data:`stages.ORDER`; None runs all that the config enables.
        launch: how a step is started on a number of ranks.

    Raises:
        UserError: for bad input, before anything is trained.
        StageFailed: when a training process fails.
        Preempted: when this process is asked to stop.
    """
    world_size = launcher.num_processes(config)
    config = resolve_epochs(config, world_size)
    names = planned(config)
    if only:
        for name in only:
            if name not in names:
                raise UserError(f"--only {name}: this run has {', '.join(names)}")
        names = [name for name in names if name in only]
    folder = RunFolder(config.run_dir)
    _check_and_tokenize(config, names, folder, world_size)
    with hold_lock(folder.root / ".lock", "`erniesearch run`"):
        folder.record(config)
        for name in names:
            _run_step(config, name, folder, world_size, launch)
    if "evaluate" in names:
        Report.load(folder.root).show(table_console())
        say(f"summary: {folder.root / 'summary.md'}")
        if written := write_report(folder.root):
            say(f"report: {written}")


def _check_and_tokenize(
    config: RunConfig, names: list[str], folder: RunFolder, world_size: int
) -> None:
    """What can be wrong, before anything is started; and the tokens for all ranks."""
    data = load_beir(config.data.path, config.data.train_split, config.data.use_titles)
    held_out = with_split(data, config.data.path, config.evaluation.split)
    evaluation_subset(held_out, config.evaluation, config.seed)
    check_analyzer(config.evaluation.bm25_stemmer, config.evaluation.bm25_tokenizer)
    if config.evaluation.late_interaction_index and not stages.trains_late_interaction(config):
        raise UserError(
            "config key 'evaluation.late_interaction_index' is True: must be False while no stage"
            " trains late interaction (weights.li and the terms that teach it)"
        )
    if "teacher_check" in names:
        with_split(data, config.data.path, stages.check_split(config))
    check_inputs(config, data)
    if config.training.vector_search != "auto":
        check_search(config.training.vector_search, config.stages.mine.depth)
    if any(
        not is_done(folder.stage(name), stages.fingerprint(config, name, world_size))
        for name in names
        if name in TRAINING_STAGES
    ):
        launcher.check_devices(config)
        check_trackers(config.training.trackers)
        prompt = read_start(config.student).text_format.passage.prompt
        open_tokens(data.passages, load_tokenizer(config.student), prompt)  # ranks have one thread


def _run_step(
    config: RunConfig, name: str, folder: RunFolder, world_size: int, launch: Launch
) -> None:
    if is_done(folder.stage(name), stages.fingerprint(config, name, world_size)):
        say(f"{name}: done before")
        return
    _check_upstream(config, name, world_size, folder)
    begin(name)
    launch(config, name, world_size)


def _check_upstream(config: RunConfig, name: str, world_size: int, folder: RunFolder) -> None:
    """With ``only``, what a step builds on may be missing or made with other settings."""
    for source in stages.upstream(config, name):
        if not is_done(folder.stage(source), stages.fingerprint(config, source, world_size)):
            raise UserError(
                f"step {name} builds on {source}, which is not done with these settings: run it"
                f" too (--only {source},{name}), or leave --only out"
            )


def export_run(config: RunConfig, onnx: bool) -> list[Path]:
    """Export a run again (``erniesearch export``); the cards get the evaluation's results if they
    belong to the models that are there now.

    Raises:
        UserError: if there is nothing to export, or another process writes in the run's folder.
    """
    folder = RunFolder(config.run_dir)
    with hold_lock(folder.root / ".lock", "`erniesearch run`"):
        marker = folder.stage("evaluate") / "done.json"
        results = None
        if marker.is_file() and is_done(
            marker.parent, stages.fingerprint(config, "evaluate", launcher.num_processes(config))
        ):
            results = Report.load(folder.root).for_card()
        return export_all(config, onnx, results)


def planned(config: RunConfig) -> list[str]:
    """The steps this config runs, in order."""
    used = {s.negatives for s in training_stages(config).values() if s.steps and s.num_negatives}
    enabled = {name for name in STAGE_NAMES if stages.is_enabled(config, name)}
    if not (config.stages.cascade.steps and "mined" in used):
        enabled.discard("mine")
    if "bm25" in used:
        enabled.add("bm25")
    trained = [name for name in TRAINING_STAGES if name in enabled]
    if not trained:
        raise UserError("the config trains nothing: set stages.NAME.steps above 0")
    return [name for name in stages.ORDER if name in enabled | {"export", "evaluate"}]
