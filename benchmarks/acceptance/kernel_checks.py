"""The kernels: their tests, their memory accesses, their speed beside others.

Started itself, it is what runs under compute-sanitizer: every kernel once, forward and backward.
"""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acceptance.check import ROOT, Context, Failed, Skipped, last_lines, missing, require
from acceptance.machine import sanitizer as sanitizer_path

TESTS = ROOT / "tests" / "kernel"
INTERPRETED = "interpreter and (equal_tokens or tiny_shares)"
"""A few of the tests, in Triton's interpreter: it takes milliseconds for each program."""

CASES = {
    "gpu": ["gpu_a", "gpu_b", "gpu_group", "gpu_token_kl", "gpu_attention_kl"],
    "cpu": ["cpu_tiny"],
}
UNSUPPORTED = "Device not supported"


def tests(context: Context) -> None:
    """The tests marked cuda; without a GPU a few of them in Triton's interpreter."""
    names = ("maxsim", "kl", "contract", *("gpu", "operators") * context.gpu)
    files = [TESTS / f"test_kernels_{name}.py" for name in names]
    if not missing(["deepspeed"]):
        files.append(TESTS / "test_kernels_training.py")
    report = context.folder / "report.xml"
    command = ["-m", "pytest", *map(str, files), "-q", "-p", "no:cacheprovider",
               "--junit-xml", str(report)]  # fmt: skip
    wanted = ["-m", "cuda and not slow"] if context.gpu else ["-k", INTERPRETED]
    if context.gpu and not missing(["xdist"]):  # compiling takes the time, and it takes cores
        wanted += ["-n", str(max(1, (os.cpu_count() or 2) // 2))]
    environment = {} if context.gpu else {"TRITON_INTERPRET": "1"}
    failure = None
    try:
        context.python(*command, *wanted, environment=environment)
    except Failed as error:
        failure = error
    if report.is_file():
        suite = ElementTree.parse(report).getroot()[0]
        context.tell(**{key: int(suite.attrib[key]) for key in
                        ("tests", "failures", "errors", "skipped")})  # fmt: skip
        context.tell(not_passed=[
            f"{case.attrib['classname']}::{case.attrib['name']}" for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ][:50])  # fmt: skip
    if failure:
        raise failure
    figures = context.figures
    require(figures["tests"] > figures["skipped"], "no test ran")


def sanitizer(context: Context) -> None:
    """compute-sanitizer's memcheck over every kernel; without it they run all the same, and what
    they compute is compared."""
    out = context.folder / "errors.json"
    command = ["-m", "acceptance.kernel_checks", str(out)]
    environment = {} if context.gpu else {"TRITON_INTERPRET": "1"}
    tool = Path(sanitizer_path())
    if not context.gpu or not tool.is_file():
        context.python(*command, environment=environment)
        context.tell(relative_errors=json.loads(out.read_text()))
        where = "" if context.gpu else ", and there is no GPU"
        raise Skipped(
            f"compute-sanitizer is not installed{where}"
            if not tool.is_file() else "there is no GPU"
        )  # fmt: skip
    done = subprocess.run(
        [str(tool), "--tool", "memcheck", "--error-exitcode", "9", sys.executable, *command],
        cwd=ROOT, capture_output=True, text=True,
        # With the allocator's cache a read past a tensor would still be in allowed memory.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    (context.folder / "log.txt").write_text(said)
    if UNSUPPORTED in said:
        raise Skipped(f"compute-sanitizer: {UNSUPPORTED}")
    require(done.returncode == 0, f"status {done.returncode}: {last_lines(said)}")
    context.tell(relative_errors=json.loads(out.read_text()), summary=last_lines(said, 80))


def benchmark(context: Context) -> None:
    """kernels/benchmarks/benchmark.py: ours, plain PyTorch, torch.compile and installed peers."""
    device, rounds = ("cuda", "20") if context.gpu else ("cpu", "3")
    ours = "erniesearch_triton" if context.gpu else "erniesearch_torch"
    for name in CASES[context.size]:
        out = context.folder / f"{name}.json"
        context.python(
            str(ROOT / "kernels" / "benchmarks" / "benchmark.py"), "--device", device, "--rounds",
            rounds, "--cases", name, "--output", str(out),
        )  # fmt: skip
        results = json.loads(out.read_text())["cases"][name]["results"]
        context.tell(**{name: {candidate: _shown(result) for candidate, result in results.items()}})
        require("error" not in results[ours], f"{name}: {ours}: {results[ours].get('error')}")


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        return {"error": result["error"]}
    return {
        "forward_ms": round(1e3 * result["forward"]["median_s"], 4),
        "forward_backward_ms": round(1e3 * result["forward_backward"]["median_s"], 4),
        "peak_mb": round(result["peak_bytes"] / 1e6, 3),
    }


def main(out: str) -> None:
    """Every kernel on small, odd sizes with masks; writes errors relative to the reference."""
    import erniesearch_kernels as kernels
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    queries, passages, group = draw(3, 17, 40), draw(5, 33, 40), draw(3, 2, 33, 40)
    teacher = draw(3, 2, 17, 33).softmax(-1)
    heads = draw(3, 2, 4, 17, 16), draw(3, 2, 4, 33, 16)
    query_mask = draw(3, 17) > -1
    masks = draw(5, 33) > -1, draw(3, 2, 33) > -1
    calls: dict[str, tuple[Any, Callable[..., tuple[Any, ...]]]] = {
        "maxsim": (passages, lambda q, p, b: (kernels.maxsim(q, p, query_mask, masks[0],
                                                             backend=b),)),
        "maxsim_group": (group, lambda q, p, b: (kernels.maxsim(q, p, query_mask, masks[1],
                                                                backend=b),)),
        "token_kl": (group, lambda q, p, b: kernels.maxsim_token_kl(
            q, p, teacher, 0.5, query_mask, masks[1], backend=b)),
        "attention_kl": (group, lambda q, p, b: kernels.maxsim_attention_kl(
            q, p, *heads, 0.5, query_mask, masks[1], backend=b)),
    }  # fmt: skip
    errors = {}
    for name, (texts, call) in calls.items():
        made = []
        for backend in ("triton", "eager"):
            leaves = [x.clone().requires_grad_() for x in (queries, texts)]
            outputs = call(*leaves, backend)
            total = torch.stack([(x * x.detach().cos()).sum() for x in outputs]).sum()
            made.append([*outputs, *torch.autograd.grad(total, leaves)])
        errors[name] = max(
            float((own - wanted).abs().max() / wanted.abs().max())
            for own, wanted in zip(*made, strict=True)
        )
    wrong = {name: error for name, error in errors.items() if not error < 1e-4}
    if wrong:
        raise AssertionError(f"relative errors: {wrong}")
    Path(out).write_text(json.dumps({name: float(f"{e:.1e}") for name, e in errors.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
