"""Other libraries, each in an environment of its own.

The environments are made by pip beside torch and what else is installed here, in the folder that
ERNIESEARCH_PEERS names (kept for the next time) or in a temporary one. Where pip finds no package
index, the tests that ask are skipped.
"""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Arguments of pip, one call after the other. PyLate pins sentence-transformers and transformers,
# and its fast-plaid brings another torch, which loading and scoring do not need.
ENVIRONMENTS = {
    "sentence-transformers-6.2": [["sentence-transformers==6.2.0"]],
    "sentence-transformers-5.3": [["sentence-transformers==5.3.0"]],
    "pylate-1.6": [
        ["sentence-transformers==5.3.0", "transformers==5.3.0", "fastkmeans==0.5.0",
         "ujson==5.12.0"],
        # The kernels that this project's tests install is too new for that transformers.
        ["--no-deps", "pylate==1.6.0", "kernels==0.10.5"],
    ],
    # optimum, which sentence-transformers runs ONNX with, is not ready for transformers 5.
    "onnx": [
        ["sentence-transformers[onnx]==5.3.0", "transformers==4.57.6", "optimum-onnx==0.1.0",
         "httpx"],
        ["--no-deps", "kernels==0.10.5", "datasets==4.4.1"],
    ],
}  # fmt: skip
ST_6, ST_5, PYLATE, ONNX = ENVIRONMENTS
Peer = Callable[..., Any]


def peers(root: Path) -> Peer:
    """``peer(environment, script, **values)``: the JSON that a script prints last."""

    def run(name: str, script: str, **values: Any) -> Any:
        python = make_environment(root, name)
        result = subprocess.run(
            [python, "-c", SETUP + script], input=json.dumps(values), capture_output=True,
            text=True, check=False, timeout=1500,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


def make_environment(root: Path, name: str) -> Path:
    """The Python of an environment, made if it is not there whole."""
    calls = ENVIRONMENTS[name]
    digest = hashlib.sha256(json.dumps([calls, torch.__version__]).encode()).hexdigest()[:12]
    folder = root / f"{name}-{digest}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    # Later on the path than the environment's own packages: torch is shared, peers are not.
    (packages / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pins = folder / "constraints.txt"
    pins.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    for arguments in calls:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q",
               "--disable-pip-version-check", "-c", str(pins), *arguments]  # fmt: skip
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"{name} does not install: {result.stderr.strip().splitlines()[-1]}")
    ready.touch()
    return python


SETUP = """
import json, sys, torch
values = json.load(sys.stdin)
torch.set_num_threads(1)
"""
