"""The ring exchange of late-interaction passages equals the all-gather and one process."""

import pytest
from support.processes import SUPPORT, run_python

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_scores_and_gradients_equal_one_process(world_size: int) -> None:
    status, output = run_python(
        "-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", str(SUPPORT / "ring_worker.py"),
    )  # fmt: skip
    assert status == 0, output[-4000:]
    assert output.count("as one process") == world_size
