"""One YAML file describes a whole run; every field below is a key of it.

The dataclasses are frozen and nested as the YAML is. ``jsonargparse`` builds ``--help`` and the
``--a.b value`` overrides from the attribute docstrings; ``checks`` holds what types cannot say.
"""

from dataclasses import dataclass, field
from typing import Literal

from erniesearch.config.stage_keys import StagesConfig, TrainingStageConfig

Precision = Literal["auto", "fp32", "bf16"]
AttnImplementation = Literal["sdpa", "eager", "flash_attention_2", "unpadded"] | None
MAX_TOKENS = 8192
"""Tokens that are kept of a passage (``erniesearch.data.corpus.tokens``)."""


@dataclass(frozen=True)
class DataConfig:
    """The data set and how its text becomes tokens."""

    path: str
    """Folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/{train,dev,test}.tsv."""
    train_split: str = "train"
    """Name of the qrels file (without .tsv) to train on."""
    max_query_length: int = 32
    """Longest query in tokens, [CLS] and [SEP] included; longer ones are truncated."""
    max_passage_length: int = 128
    """Longest passage in tokens, [CLS] and [SEP] included, at most 8192; longer ones are
    truncated."""
    use_titles: bool = True
    """Put a passage's title before its text, separated by a space."""


@dataclass(frozen=True)
class StudentConfig:
    """The student: one encoder with a dual-encoder and a late-interaction head."""

    path: str
    """Pretrained encoder or published model (sentence-transformers, PyLate, ColBERT): a folder,
    'package:NAME' for weights shipped in the Python package NAME, or a hub name."""
    revision: str | None = None
    """Commit of the hub repository; ignored for folders and packages."""
    keep: Literal["all", "all_but_lengths", "weights_only"] = "all"
    """What training and exports keep of a published model: all that its folder says (pooling,
    projection, prompts, prefixes, query expansion, skip list, lengths), where settings that
    contradict are an error; the same but for the lengths, which are the data's; or the
    transformer's weights alone."""
    query_prompt: str | None = None
    """Text put before every query; null is the published model's, or none."""
    passage_prompt: str | None = None
    """Text put before every passage; null is the published model's, or none."""
    pooling: Literal["cls", "mean"] = "cls"
    """The passage and query vector: the first token's state, or the mean over real tokens."""
    normalize: bool = False
    """Scale the dual-encoder's vectors to length 1, so that scores are cosines."""
    tied: bool = True
    """One tower for queries and passages; false trains one each, both from the same weights."""
    late_interaction_dim: int = 128
    """Dimensions of a late-interaction token vector."""
    dropout: float | None = None
    """Overrides the checkpoint's hidden and attention dropout; null keeps them."""
    layers: int | list[int] | None = None
    """Keep these layers of the pretrained encoder, counted from 0; a number n keeps n evenly
    spaced ones, the first and the last among them. Null keeps all."""
    attn_implementation: AttnImplementation = None
    """How attention is computed: sdpa, eager, flash_attention_2 (a GPU, bf16, the package
    flash-attn) or unpadded, which computes no padding at all: texts are packed into one row, with
    PyTorch's attention for variable lengths on a GPU in bf16, text by text on a CPU; it has no
    attention dropout. Null takes what suits model and device. Speed and memory only."""
    freeze_embeddings: bool = False
    """Leave the word embeddings as they are: no gradient and no optimizer state for what is, in a
    small model, most of its parameters."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Only for checkpoints you trust."""


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher: a cross-encoder of any size over the same vocabulary."""

    path: str = ""
    """Pretrained encoder as in student.path; empty means the student's."""
    revision: str | None = None
    """Commit of the hub repository; ignored for folders and packages."""
    dropout: float | None = None
    """Overrides the checkpoint's hidden and attention dropout; null keeps them."""
    attn_implementation: AttnImplementation = None
    """As student.attn_implementation."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Only for checkpoints you trust."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Temperatures and switches shared by all stages (weights are per stage)."""

    tau_de: float = 1.0
    """Temperature of the dual-encoder's scores."""
    tau_li: float = 1.0
    """Temperature of the late-interaction scores."""
    tau_att: float = 1.0
    """Temperature of the student's token similarities in the attention-map KL."""
    tau_ce: float | Literal["auto"] = 1.0
    """Temperature of the cross-encoder as the target of a KL. auto: the likelihood-best one, which
    the stage teacher finds on held-out lists when it ends and stores with the model."""
    tau_stored: float | Literal["auto"] | None = None
    """Temperature of stored scores as a target (stages.NAME.teacher_scores); null is tau_ce. auto:
    the likelihood-best one on the stored lists themselves, for a teacher of unknown scale."""
    tau_de_kl: float | None = None
    """Temperature of the dual-encoder in ce_to_de and li_to_de; null is tau_de."""
    tau_li_kl: float | None = None
    """Temperature of late interaction in ce_to_li; null is tau_li."""
    tau_li_target: float | None = None
    """Temperature of late interaction as the target of li_to_de; null is tau_li."""
    tau_de_margin: float | None = None
    """Temperature of the dual-encoder in margin_mse_de, the scale on which its margins are compared
    with the teacher's; null is tau_de."""
    tau_li_margin: float | None = None
    """Temperature of late interaction in margin_mse_li; null is tau_li."""
    virt_layers: list[int] = field(default_factory=lambda: [-1])
    """The teacher's layers that virt takes as targets, counted from 0, or from the last one, -1.
    The student's last layer goes with the teacher's last, and evenly from there."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Train the dual-encoder's first dimensions as vectors of their own (Matryoshka, Kusupati et
    al. 2022), e.g. [256, 128, 64]: each of its terms is the mean over the whole vector and these
    prefixes, of length 1 where student.normalize says so. `encode` and `evaluate` take --dim."""
    candidates: Literal["cross_batch", "in_batch", "group"] = "cross_batch"
    """Which passages of a micro-step the students' terms compare: those of all ranks (cross-batch
    negatives), those of the query's own rank (in-batch negatives, whose number depends on
    queries_per_rank; on one rank the two are the same), or the query's own group alone."""
    detach_targets: bool = True
    """Stop the gradient at the first argument of every KL. False lets the KL train the target
    too; attention maps are always detached."""
    competence_gate: bool = False
    """Count a KL term only while its teacher's running accuracy exceeds its student's: the
    cross-encoder's terms by accuracy on the group, late interaction to dual-encoder by accuracy
    over all candidates (not in the paper)."""
    kernels: Literal["auto", "triton", "torch", "eager"] = "auto"
    """Backend of MaxSim and the attention KL: auto takes Triton on a GPU and the chunked PyTorch
    path on a CPU; eager materialises every similarity."""
    late_interaction_exchange: Literal["all_gather", "ring"] = "all_gather"
    """How a rank's queries meet the other ranks' passage tokens: all_gather holds those of all
    ranks; ring passes them round and holds two ranks' at a time, so that memory does not grow with
    the ranks. The ring sends about twice the bytes and computes MaxSim once more."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the engine, the same for every stage."""

    num_processes: int = 0
    """Processes per node started by `erniesearch run`; 0 means one per GPU, or 2 on a CPU."""
    vector_search: Literal["auto", "cpu", "gpu", "gpu_fp16"] = "auto"
    """Where mine, teacher_check and evaluate search a student's vectors: auto shares them out over
    all GPUs if FAISS is built for some, and says why where it is not or they do not fit; gpu ends
    with an error instead. gpu_fp16 keeps the vectors there in fp16, half the memory; near ties may
    change their order."""
    threads_per_process: int = 1
    """CPU threads per process; more than the cores allow makes everything slower."""
    precision: Precision = "auto"
    """Of training, and of encoding and scoring with its models. auto is bf16 on GPUs and on CPUs
    with AVX512-BF16 or AMX, fp32 elsewhere; bf16 has fp32 master weights. A stage that continues
    from a checkpoint goes on in the checkpoint's."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage, with the other values of the shipped section of its number; null means
    1, or the stage in zero_json."""
    zero_json: str | None = None
    """JSON file with a `zero_optimization` section only, or the name of a shipped one: zero0 to
    zero3."""
    weight_decay: float = 0.01
    """AdamW's weight decay; biases and LayerNorm have none."""
    max_grad_norm: float = 1.0
    """Clip the gradient's global norm; 0 switches clipping off."""
    log_every: int = 1
    """Updates between two lines in metrics.jsonl and the trackers."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Where the figures are shown besides metrics.jsonl; each needs the package of its name. They
    go to the project erniesearch, or the one in WANDB_PROJECT, TRACKIO_PROJECT or
    MLFLOW_EXPERIMENT_NAME."""
    save_every: int = 50
    """Updates between two checkpoints; 0 saves none before the end of the stage."""
    keep_checkpoints: int = 2
    """Newest checkpoints of a stage that are kept; the older ones are there for when the newest
    turns out to be damaged."""
    validation_split: str | None = None
    """Name of a qrels file (without .tsv), e.g. dev: every checkpoint of a stage is measured on
    this split's queries, by the loss over random negatives and by validation_metrics, and the best
    one is kept beside the newest. Null measures nothing."""
    validation_queries: int = 256
    """Queries of validation_split that are measured; for the loss rounded up to whole batches."""
    validation_metrics: list[str] = field(default_factory=list)
    """Retrieval metrics on validation_split, e.g. [MRR@10, nDCG@10, R@100], of each model that the
    stage trains: the dual-encoder (logged as MRR@10_de) searches a part of the corpus exactly, late
    interaction (_li) and the cross-encoder (_ce) rerank what it finds; where no dual-encoder is
    trained, fixed lists of the positives and BM25's best. Empty measures the loss alone."""
    validation_distractors: int | None = 10_000
    """Passages searched for validation_metrics besides the judged ones, drawn with the run's seed,
    or all if there are fewer; null takes the whole corpus."""
    validation_rerank_depth: int = 20
    """Candidates a query that late interaction and the cross-encoder rerank for
    validation_metrics."""
    evaluate_every: int = 0
    """Updates between two measurements on validation_split; 0 measures at checkpoints alone. One
    that is the best so far is saved as a checkpoint too."""
    best_metric: str = "loss"
    """What makes a checkpoint the best: the validation loss, or a metric, e.g. nDCG@10, of the
    dual-encoder, or where a stage trains none, of late interaction or the cross-encoder;
    nDCG@10_li and nDCG@10_ce name the model."""
    early_stopping_patience: int | None = None
    """End a stage after this many measurements in a row that were not the best. Null never does."""
    load_best_model_at_end: bool | None = None
    """A stage's result is its best checkpoint by best_metric, not the model after the last update.
    Null: if early_stopping_patience is set. `erniesearch export-checkpoint --best` writes the best
    one in any case."""
    async_save: bool = False
    """Copy a checkpoint in memory and write it while the training goes on. Takes memory for one
    rank's part of the checkpoint; a kill during the write costs that checkpoint alone."""
    timeout_minutes: float = 30.0
    """End the stage, with every rank's last step in the message, when a rank has made no progress
    for this long."""
    max_nonfinite: int = 10
    """An update whose loss or gradient is not finite is skipped; end the stage after this many in
    a row."""
    num_workers: int = 0
    """Data-loading processes per rank; 0 tokenises in the training process."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant) to save memory."""
    compile: bool = False
    """Compile the encoders' layers by torch.compile, for batches of any width. The first updates
    take longer; results are equal up to rounding. Not with ZeRO-3, recomputed activations, or
    texts without padding."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What the run is measured on."""

    split: str = "test"
    """Name of the qrels file (without .tsv) to evaluate on."""
    max_queries: int | None = None
    """Evaluate on this many queries, drawn with the run's seed; null takes all."""
    num_distractors: int | None = None
    """Passages searched besides those relevant to the evaluated queries; null takes the whole
    corpus. Figures for different numbers do not compare."""
    rerank_depth: int = 100
    """Candidates of the dual-encoder that late interaction and cross-encoder rerank."""
    batch_size: int = 128
    """Texts that a model gets at a time; on a CPU those of similar length go through it
    together."""
    token_vectors_gib: float = 2.0
    """Keep late interaction's vectors of the whole corpus in run_dir, in fp16, if they take at most
    so many GiB: reranking, `search` and `serve` then encode no passage. 0 keeps none."""
    late_interaction_index: bool = False
    """Index late interaction's vectors of the whole corpus, for the row 'late interaction, end to
    end' and for --first_stage late_interaction of `search` and `serve`. Off by default: k-means
    over token vectors takes longer than all other indexing."""
    bm25_stemmer: str | None = "english"
    """Snowball stemmer of the BM25 row, or null for none."""
    bm25_tokenizer: Literal["words", "code", "jieba"] = "words"
    """How BM25 splits text, in the table and for BM25 negatives: words of letters and digits
    without English stop words; code, which splits identifiers into words too; or jieba for Chinese
    (extra zh)."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    run_dir: str
    """Folder that receives checkpoints, metrics, runs, exports and the summary."""
    data: DataConfig
    """The data set."""
    student: StudentConfig
    """The student model."""
    seed: int = 42
    """Fixes data order, dropout and the initialisation of new heads."""
    teacher: TeacherConfig = TeacherConfig()
    """The teacher model."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Temperatures and switches."""
    training: TrainingConfig = TrainingConfig()
    """Engine settings."""
    stages: StagesConfig = StagesConfig()
    """The stages."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation."""


TRAINING_STAGES = ("post_train", "contrastive", "interaction", "teacher", "cascade")


def training_stages(config: RunConfig) -> dict[str, TrainingStageConfig]:
    """The training stages by name, those with ``steps: 0`` included."""
    return {name: getattr(config.stages, name) for name in TRAINING_STAGES}
