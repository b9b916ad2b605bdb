"""Several nodes without Slurm: a launcher per node, here two on the loopback interface, trains as
one launcher with as many ranks does, bit for bit."""

from pathlib import Path

import pytest
from support.processes import losses_of, run_python, start
from support.tiny import ConfigMaker

from erniesearch.config.yaml_file import to_yaml
from erniesearch.distributed import free_port
from erniesearch.run_folder import RunFolder

pytestmark = pytest.mark.distributed
# Two nodes that are one machine would both take its first GPU.
CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def arguments(make_config: ConfigMaker, tmp_path: Path) -> tuple[str, ...]:
    """The training, dropout included."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(make_config(steps=3, queries_per_rank=2)))
    return ("launch/train.py", "--stage", "cascade", "--config", str(file))


@pytest.fixture(scope="module")
def reference_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one-node")


@pytest.fixture
def one_node(arguments: tuple[str, ...], reference_root: Path) -> list[dict]:
    """Loss trace of two ranks under one launcher, trained by the first test that asks."""
    stage = RunFolder(reference_root).stage("cascade")
    if not (stage / "done.json").exists():
        status, output = run_python(
            "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0", *arguments, "--run_dir", str(reference_root), **CPU,
        )  # fmt: skip
        assert status == 0, output[-3000:]
    return losses_of(stage)


@pytest.mark.slow
def test_two_torchrun_nodes(
    arguments: tuple[str, ...], one_node: list[dict], tmp_path: Path
) -> None:
    port = free_port()
    nodes = [
        start("-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
              "--nproc_per_node=1", "--rdzv_id=7", "--rdzv_backend=c10d",
              f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", *arguments,
              "--run_dir", str(tmp_path / "two"), **CPU)
        for node in range(2)
    ]  # fmt: skip
    for node in nodes:
        output, _ = node.communicate(timeout=200)
        assert node.returncode == 0, output[-3000:]
    assert losses_of(RunFolder(tmp_path / "two").stage("cascade")) == one_node


@pytest.mark.slow
def test_two_deepspeed_nodes(
    arguments: tuple[str, ...], one_node: list[dict], tmp_path: Path
) -> None:
    """``--no_ssh``: each node starts its own launcher, all with the same host file."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    port = free_port()
    nodes = [
        start("-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--no_ssh",
              "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port),
              *arguments, "--run_dir", str(tmp_path / "two"), **CPU)
        for node in range(2)
    ]  # fmt: skip
    for node in nodes:
        output, _ = node.communicate(timeout=200)
        assert node.returncode == 0, output[-3000:]
    assert losses_of(RunFolder(tmp_path / "two").stage("cascade")) == one_node
