"""What the compiler makes of every form of every kernel, and the time that this predicts.

    python kernels/benchmarks/aot_report.py                     # about 12 minutes on one core
    python kernels/benchmarks/aot_report.py --capabilities 90   # renews these columns only

Runs without a GPU and writes ``results/aot.json``, one line per form: for each compute capability
the tile, warps, registers, bytes of spills and of shared memory, matrix instructions, and how many
instructions the loop around the matrix products has.

The prediction, for bfloat16 on an H200, counts the steps of that loop in all programs::

    tensor = flops of a step / (MEASURED_FLOPS / SM)
    issue  = instructions of one warp in a step * num_warps / (4 schedulers * CLOCK)
    cache  = bytes of a step from L2 / (L2_BYTES / SM)
    time   = steps / SM * max(tensor, issue, cache)      if all of them overlap
           = steps / SM * (tensor + issue + cache)       if nothing does

and never less than the problem's bytes at the device memory's measured rate. Overlap is counted
where two blocks or more share a multiprocessor: one computes products while the other does the
rest. It leaves out latency and the tail of the last wave, so the truth may lie above both. It has
not been compared with a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from candidates import CASES, Case
from erniesearch_kernels.ahead_of_time import (
    CAPABILITIES,
    Compiled,
    Configuration,
    compile_one,
    configurations,
    rarer_forms,
)
from erniesearch_kernels.triton_tiles import SHARED_LIMIT, passage_gradient_config

OUTPUT = Path(__file__).parent / "results" / "aot.json"
FIELDS = ("tile", "warps", "registers", "spills", "shared", "matrix", "products", "loop", "blocks")
# An H200: multiprocessors, clock under load (Hz); dense bfloat16 rate and memory bandwidth measured
# on such a card; L2 to multiprocessors as estimated from other kernels' published times.
SM, CLOCK, MEASURED_FLOPS, DEVICE_BYTES, L2_BYTES = 132, 1.755e9, 790e12, 4.3e12, 4.5e12
# The cases whose times are goals, in the form with masks, as in training.
PREDICTED = {
    "gpu_a": "maxsim", "gpu_b": "maxsim", "gpu_token_kl": "token_kl",
    "gpu_attention_kl": "attention_kl",
}  # fmt: skip
STEPS = ("forward", "query_gradient", "passage_gradient")


def blocks(number: int, block: int) -> int:
    return -(-number // block)


def work(operation: str, step: str, case: Case, meta: dict[str, Any]) -> tuple[int, int, int]:
    """Loop steps of all programs; similarity-sized products of a step (2 flops per element and
    dimension); bytes of a step from L2."""
    rows, dim = case.num_queries * case.query_length, case.dim
    m, n, k = (meta.get(f"BLOCK_{side}", 0) for side in "MNK")
    if operation == "maxsim":
        if step == "forward":
            tiles = blocks(rows, m) * case.num_passages * blocks(case.passage_length, n)
            return tiles, m * n, 2 * n * dim
        if step == "query_gradient":  # gathers rows: no products; winner (1) and gradient (4)
            return blocks(rows, m) * case.num_passages, 0, m * (2 * dim + 5)
        n += meta["TAIL"]
        tiles = case.num_passages * blocks(case.passage_length, n) * blocks(rows, k)
        return tiles, n * k, k * (2 * dim + 5)
    pairs = case.num_queries * case.group
    tiles = pairs * blocks(case.query_length, m) * blocks(case.passage_length, n)
    heads = case.heads * case.head_dim if operation == "attention_kl" else 0
    products = m * n * (1 + (step != "forward")) + m * n * heads // dim
    return tiles, products, 2 * n * (dim + heads) + (0 if heads else 2 * m * n)


def device_bytes(operation: str, step: str, case: Case) -> int:
    """Inputs read once and outputs written once, 2 bytes an element."""
    if operation == "maxsim":
        tokens = case.num_queries * case.query_length + case.num_passages * case.passage_length
        winners = case.num_passages * case.num_queries * case.query_length
        return tokens * case.dim * 2 + winners
    pairs = case.num_queries * case.group
    tokens = case.num_queries * case.query_length + pairs * case.passage_length
    if operation == "attention_kl":
        teacher = pairs * case.heads * case.head_dim * (case.query_length + case.passage_length)
    else:
        teacher = pairs * case.query_length * case.passage_length
    written = case.dim * pairs * case.passage_length if step == "passage_gradient" else 0
    return 2 * (tokens * case.dim + teacher + written)


def predict(case: Case, operation: str, step: str, meta: dict[str, Any], compiled: Compiled) -> Any:
    """Milliseconds on an H200, the parts and what binds."""
    steps, products, l2 = work(operation, step, case, meta)
    instructions = sum(compiled.loop.values())
    if operation == "attention_kl":  # the loop over heads turns once in the machine code
        instructions += sum(compiled.inner_loop.values()) * (case.heads - 1)
    parts = {
        "tensor": 2 * products * case.dim / (MEASURED_FLOPS / SM),
        "issue": instructions * meta["num_warps"] / (4 * CLOCK),
        "l2": l2 / (L2_BYTES / SM),
    }
    ms = {name: steps / SM * seconds * 1e3 for name, seconds in parts.items()}
    floor = device_bytes(operation, step, case) / DEVICE_BYTES * 1e3
    serial, own_blocks = max(sum(ms.values()), floor), compiled.blocks(90)
    overlapped = max(*ms.values(), floor) if own_blocks > 1 else serial
    return {
        **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
        "memory_ms": round(floor, 3),
        "blocks": own_blocks,
        "overlapped_ms": round(overlapped, 3),
        "serial_ms": round(serial, 3),
        "binds": max({**ms, "memory": floor}.items(), key=lambda item: item[1])[0],
    }


def predictions(form: Configuration, compiled: Compiled) -> dict[str, Any]:
    """By case, for the kernels that the predicted cases run."""
    kernel, dtype, dim, *variant = form.name.split("/")
    found = {}
    for name, operation in PREDICTED.items():
        for step in STEPS:
            own = ["masked"] if operation == "maxsim" else []
            if operation == "maxsim" and step == "passage_gradient":
                length = CASES[name].passage_length
                tail = passage_gradient_config(torch.bfloat16, 128, 90, tokens=length)["TAIL"]
                own += ["tail"] * (tail > 0)
            if (kernel, dtype, dim, variant) == (
                f"{operation}_{step}", "bfloat16", "d128", own,
            ):  # fmt: skip
                found[name] = predict(CASES[name], operation, step, form.meta, compiled)
    return found


def forms(capability: int) -> Iterator[Configuration]:
    """Every usual form and every rarer one, at d=128 (float16 compiles to what bfloat16 does)."""
    for dtype in (torch.bfloat16, torch.float32):
        yield from configurations(capability, dtypes=(dtype,))
        yield from rarer_forms(capability, dtype)


def column(form: Configuration, compiled: Compiled) -> list[Any]:
    """In the order of ``FIELDS``."""
    tile = "x".join(str(form.meta[f"BLOCK_{x}"]) for x in "MNK" if f"BLOCK_{x}" in form.meta)
    matrix = compiled.matrix()
    return [
        tile, form.meta["num_warps"], compiled.registers, compiled.spill_bytes,
        compiled.shared_bytes, matrix, compiled.instructions.get(matrix, 0),
        sum(compiled.loop.values()), compiled.blocks(form.capability),
    ]  # fmt: skip


def lines(table: dict[str, Any]) -> str:
    """JSON with one line per entry."""
    entries = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    return "{\n" + ",\n".join(entries) + "\n }"


def write(report: dict[str, Any]) -> None:
    limits = {str(k): SHARED_LIMIT[k] for k in CAPABILITIES}
    head = {"triton": report["triton"], "fields": FIELDS, "shared_limit": limits}
    parts = [f' "{name}": {json.dumps(value)}' for name, value in head.items()]
    parts += [f' "{name}": {lines(report[name])}' for name in ("predicted_h200", "forms")]
    OUTPUT.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    report: dict[str, Any] = {"triton": triton.__version__, "predicted_h200": {}, "forms": {}}
    wanted = parser.parse_args().capabilities
    if OUTPUT.exists():
        earlier = json.loads(OUTPUT.read_text())
        if earlier["triton"] == triton.__version__ and set(wanted) != set(CAPABILITIES):
            report = earlier
    for capability in wanted:
        for form in forms(capability):
            compiled = compile_one(form)
            entry = report["forms"].setdefault(form.name, {})
            entry[str(capability)] = column(form, compiled)
            if compiled.spills():
                sys.stderr.write(f"{form.name} spills on sm_{capability}\n")
            if capability == 90:
                for case, times in predictions(form, compiled).items():
                    report["predicted_h200"][f"{case} {form.name}"] = times
            write(report)  # what is done is kept
    sys.stdout.write(f"{OUTPUT}\n")


if __name__ == "__main__":
    main()
