"""Render the README's tables from the committed JSON files.

python kernels/benchmarks/render_table.py             # rewrites kernels/README.md
python kernels/benchmarks/render_table.py --check     # fails if it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
USUAL = {"even", "masked", "normalized", "group", "varlen", "tail"}
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def timing_table(name: str, report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread(s)"
    lines = [f"`results/{name}`: {where}; {versions}.", ""]
    for case_name, measured in report["cases"].items():
        case = measured["case"]
        against = (
            f"own groups of {case['group']}"
            if case["group"]
            else f"{case['num_passages']} passages"
        )
        lines += [
            f"**{case_name}**: {case['op']}, {case['num_queries']} queries of "
            f"{case['query_length']} tokens, {against} of {case['passage_length']} tokens, "
            f"d={case['dim']}, {case['dtype']}",
            "",
            "| implementation | forward, ms | forward + backward, ms (quartiles) | peak, MB |",
            "|---|---|---|---|",
        ]
        for candidate, result in measured["results"].items():
            if "error" in result:
                lines.append(f"| {candidate} | does not run here | | |")
                continue
            both = result["forward_backward"]
            lines.append(
                f"| {candidate} | {result['forward']['median_s'] * 1e3:.1f} "
                f"| {both['median_s'] * 1e3:.1f} ({both['q1_s'] * 1e3:.1f} to "
                f"{both['q3_s'] * 1e3:.1f}) | {result['peak_bytes'] / 1e6:.1f} |"
            )
        lines += ["", *ratios(measured["results"]), ""]
    return lines


def ratios(results: dict[str, Any]) -> list[str]:
    """Ours against the fastest other implementation, forward and backward together."""
    seconds = {
        name: result["forward_backward"]["median_s"]
        for name, result in results.items()
        if "error" not in result
    }
    ours = [name for name in seconds if name.startswith("erniesearch")]
    fastest = min((name for name in seconds if name not in ours), key=lambda name: seconds[name])
    peak = results[fastest]["peak_bytes"]
    return [
        f"{name} takes {seconds[name] / seconds[fastest]:.3f} of the time of the fastest other "
        f"({fastest}) and {results[name]['peak_bytes'] / peak:.3f} of its memory."
        for name in ours
    ]


def compiled_table(report: dict[str, Any]) -> list[str]:
    columns = {
        name: {int(k): dict(zip(report["fields"], v, strict=True)) for k, v in by.items()}
        for name, by in report["forms"].items()
    }
    lines = [
        f"`results/aot.json`: {len(columns)} forms compiled by Triton {report['triton']}, d=128.",
        "",
        "| | forms | most registers | forms that spill | most shared memory, KB (of the limit) |",
        "|---|---|---|---|---|",
    ]
    for capability in sorted({k for by in columns.values() for k in by}):
        own = [by[capability] for by in columns.values() if capability in by]
        shared = max(x["shared"] for x in own) / 1024
        lines.append(
            f"| sm_{capability} | {len(own)} | {max(x['registers'] for x in own)} "
            f"| {sum(x['spills'] > 0 for x in own)} (most: {max(x['spills'] for x in own)} bytes) "
            f"| {shared:.1f} of {report['shared_limit'][str(capability)] // 1024} |"
        )
    lines += [
        "",
        "The usual forms in bfloat16 on sm_90 (*products*: matrix instructions; *loop*: "
        "instructions of the loop around them; *blocks*: how many a multiprocessor holds):",
        "",
        "| kernel | tile | warps | registers | spills | shared, KB | blocks | products | loop |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, by in columns.items():
        kernel, dtype, _dim, *variant = name.split("/")
        if dtype != "bfloat16" or not set(variant) <= USUAL or 90 not in by:
            continue
        x = by[90]
        lines.append(
            f"| {'/'.join([kernel, *variant])} | {x['tile']} | {x['warps']} | {x['registers']} "
            f"| {x['spills']} | {x['shared'] / 1024:.0f} | {x['blocks']} "
            f"| {x['products']} {x['matrix']} | {x['loop']} |"
        )
    predictions = []
    for key, times in report["predicted_h200"].items():
        case, name = key.split()
        parts = ("tensor", "issue", "l2", "memory", "overlapped", "serial")
        figures = " | ".join(str(times[f"{part}_ms"]) for part in parts)
        predictions.append(f"| {case} | {name.split('/')[0]} | {times['blocks']} | {figures} |")
    lines += [
        "",
        "Predicted on an H200, in milliseconds (model: `aot_report.py`; never measured). "
        "*overlapped*: the largest part, where two blocks or more share a multiprocessor; "
        "*serial*: the sum of tensor, issue and L2.",
        "",
        "| case | kernel | blocks | tensor | issue | L2 | memory | overlapped | serial |",
        "|---|---|---|---|---|---|---|---|---|",
        *sorted(predictions),
        "",
    ]
    return lines


def render() -> str:
    lines: list[str] = []
    for path in sorted((HERE / "results").glob("*.json")):
        report = json.loads(path.read_text())
        lines += (
            compiled_table(report) if path.name == "aot.json" else timing_table(path.name, report)
        )
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = render()
    if parser.parse_args().check:
        if text != README.read_text():
            raise SystemExit("kernels/README.md is out of date: run render_table.py")
    else:
        README.write_text(text)
        sys.stdout.write(f"{README}\n")


if __name__ == "__main__":
    main()
