"""All checks, in the order in which they run."""

from acceptance.check import Check

TRAINING = ("deepspeed", "jsonargparse", "bm25s", "rich")
CHECKS = (
    Check("machine", "acceptance.machine:check", 1, (60, 60), alone=True),
    Check(
        "kernel_tests",
        "acceptance.kernel_checks:tests",
        1,
        (120, 400),
        ("triton", "pytest", "hypothesis"),
    ),
    Check("sanitizer", "acceptance.kernel_checks:sanitizer", 1, (60, 200), ("triton",)),
    Check("collectives", "acceptance.collectives:check", 1, (60, 60)),
    Check("zero_matrix", "acceptance.zero_matrix:check", 1, (200, 240), TRAINING),
    Check("resume", "acceptance.faults:resume", 1, (150, 150), TRAINING),
    Check("nan_update", "acceptance.faults:nan_update", 1, (60, 90), TRAINING),
    Check("fewer_ranks", "acceptance.faults:fewer_ranks", 1, (120, 120), TRAINING),
    Check("visible_devices", "acceptance.faults:visible_devices", 1, (90, 90), TRAINING),
    Check("steps", "acceptance.steps:check", 2, (120, 120), TRAINING, alone=True),
    Check("kernel_benchmark", "acceptance.kernel_checks:benchmark", 2, (150, 200), alone=True),
    Check("encode", "acceptance.retrieval:encode", 2, (90, 120), ("jsonargparse", "rich"), True),
    Check("index", "acceptance.retrieval:index", 2, (90, 60), ("faiss", "jsonargparse", "rich")),
    Check("pipeline", "acceptance.retrieval:pipeline", 2, (240, 240), (*TRAINING, "faiss")),
)
