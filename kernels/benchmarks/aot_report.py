"""What the compiler makes of every shipped configuration, and the time that this predicts.

    python kernels/benchmarks/aot_report.py

Runs without a GPU and writes ``results/aot.json``: registers, spills, shared memory, matrix
instructions, and the instruction mix of the loop around the matrix products.

The prediction, for the all-pairs bfloat16 forward only, of one warp's instructions in that loop
(one tile of ``BLOCK_M x BLOCK_N`` similarities per step)::

    tensor = 2 * BLOCK_M * BLOCK_N * dim / (MEASURED_FLOPS / SM)
    issue  = instructions * num_warps / (4 schedulers * CLOCK)
    time   = tiles / SM * max(tensor, issue)      if other blocks hide what waits
           = tiles / SM * (tensor + issue)        if nothing does

It leaves out latency, L2 traffic and the tail of the last wave, so the truth may lie above both.
It has not been compared with a measurement.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
from erniesearch_kernels.ahead_of_time import Compiled, Configuration, compile_for, configurations

OUTPUT = Path(__file__).parent / "results" / "aot.json"
# An H200: multiprocessors, clock under load (Hz), dense bfloat16 rate measured on such a card.
SM, CLOCK, MEASURED_FLOPS = 132, 1.755e9, 790e12
PROBLEMS = {"A: 1024x32 against 2048x128": (1024 * 32, 2048, 128),
            "B: 1024x32 against 8192x180": (1024 * 32, 8192, 180)}  # fmt: skip


def predict(configuration: Configuration, compiled: Compiled) -> dict[str, Any]:
    meta = configuration.meta
    rows, columns = meta["BLOCK_M"], meta["BLOCK_N"]
    tensor = 2 * rows * columns * meta["DIM"] / (MEASURED_FLOPS / SM)
    issue = sum(compiled.loop.values()) * meta["num_warps"] / (4 * CLOCK)
    predictions = {}
    for name, (query_rows, passages, length) in PROBLEMS.items():
        tiles = -(-query_rows // rows) * passages * -(-length // columns) / SM
        predictions[name] = {
            "overlapped_ms": round(tiles * max(tensor, issue) * 1e3, 2),
            "serial_ms": round(tiles * (tensor + issue) * 1e3, 2),
        }
    return predictions


def main() -> None:
    report: dict[str, Any] = {"triton": triton.__version__, "configurations": []}
    for configuration in configurations():
        for capability in (80, 90):
            compiled = compile_for(configuration, capability)
            entry = {
                "name": configuration.name,
                "capability": capability,
                "tile": {
                    k: v for k, v in configuration.meta.items()
                    if k.startswith(("BLOCK_", "num_"))
                },
                "registers": compiled.registers,
                "spill_bytes": compiled.spill_bytes,
                "shared_bytes": compiled.shared_bytes,
                "HGMMA": compiled.count("HGMMA"),
                "HMMA": compiled.count("HMMA"),
                "loop_instructions": sum(compiled.loop.values()),
                "loop_mix": dict(sorted(compiled.loop.items(), key=lambda item: -item[1])[:12]),
            }  # fmt: skip
            all_pairs = configuration.name in (
                "maxsim_forward/bfloat16/d128/even", "maxsim_forward/bfloat16/d128/masked",
            )  # fmt: skip
            if capability == 90 and all_pairs:
                entry["predicted_h200"] = predict(configuration, compiled)
            report["configurations"].append(entry)
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(f"{OUTPUT}\n")


if __name__ == "__main__":
    main()
