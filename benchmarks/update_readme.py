# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md and some pages of docs/ from files under benchmarks/results.

Usage: python benchmarks/update_readme.py [--check]

A result file holds ``"table"`` (a name), ``"columns"``, ``"rows"``, and may hold ``"title"`` and
``"note"``, beside whatever else was recorded (environment, protocol, samples). A document names a
table between ``<!-- table:name -->`` and ``<!-- /table -->``; every file of that name goes there,
in the order of the file names. engine.svg is drawn beside each engine.json. ``--check`` writes
nothing and fails where a document or a chart would change.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from chart import speedup_bars
from target_sections.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "docs/results.md",
        "docs/runtime.md",
        "docs/fine-tuning.md",
        "docs/kernels/kv_attention.md",
        "docs/kernels/rmsnorm_hadamard.md",
    )
)
_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def format_cell(value) -> str:
    """Four significant digits for a measured number, text as it is, an empty cell for null."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value).replace("|", "\\|")  # a bar would end the cell


def markdown_table(result: dict) -> str:
    columns, rows = result["columns"], result["rows"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {row}: expected {len(columns)} cells, got {len(row)}")
    align = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [columns, align, *rows]
    text = "\n".join("| " + " | ".join(format_cell(c) for c in line) + " |" for line in lines)
    title = f"**{result['title']}**\n\n" if result.get("title") else ""
    note = f"\n\n{result['note']}" if result.get("note") else ""
    return f"{title}{text}{note}\n"


def update(readme: str, results: list[dict]) -> str:
    """README text with every marked table replaced; a table with no result file says so."""

    def replace(match: re.Match) -> str:
        tables = [markdown_table(r) for r in results if r["table"] == match.group(2)]
        body = "\n".join(tables) or "*Not measured yet.*\n"
        return f"{match.group(1)}{body}{match.group(3)}"

    return _MARKED.sub(replace, readme)


_GEMM_NAMES = {
    "fp8": "FP8 `_scaled_mm`",
    "int8": "`_int_mm`",
    "int4pack": "`_weight_int4pack_mm`",
    "cutlass_int8_a4": "CUTLASS int8, 4-bit values",
    "cutlass_int8_a8": "CUTLASS int8",
}


def _three_digits(value: float | None) -> str | None:
    """The spread of a timing is about a percent."""
    if value is None:
        return None
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def gemm_summary(result: dict) -> dict:
    """The 200 rows of a ``gemm_w4`` file as one row a batch size: geometric means over FP16."""
    lines = {name: line for name, line in result["speedup_over_fp16"].items() if line}
    sizes = sorted({int(m) for line in lines.values() for m in line})
    return {
        "table": "gemm-speedup",
        "title": f"Speedup over cuBLAS FP16, {result['environment']['gpu']}, geometric mean over "
        "the linears of Llama-3 8B and 70B",
        "columns": ["tokens", *(_GEMM_NAMES.get(name, name.upper()) for name in lines)],
        "rows": [[m, *(_three_digits(line.get(str(m))) for line in lines.values())] for m in sizes],
        "note": "W4A4, W4A8 and W8A8 are this package, the others its peers in the same run (at "
        f"{result['environment']['commit'][:10]}); an empty cell was not measured.",
    }


_RMSNORM_HADAMARD = "RMSNorm + Hadamard + quantize"  # what titles of its files begin with


def rmsnorm_hadamard_summary(result: dict) -> dict:
    """A file of bench_rmsnorm_hadamard.py as one row a hidden size."""

    def times(us: dict) -> str:
        named = ("ours", "rmsnorm_quantize", "rmsnorm, hadamard_quantize")
        ours, without, two = (f"{us[name][0]:.1f}" for name in named)
        return f"{ours} ({without}, {two})"

    cells = {(cell["columns"], cell["rows"]): cell for cell in result["cells"]}
    sizes, rows = (sorted({key[i] for key in cells}) for i in range(2))
    shares = {size: f"{cells[size, rows[-1]]['% of copy']:.0f}" for size in sizes}
    return {
        "table": "rmsnorm-hadamard",
        "title": f"Microseconds, {result['environment']['gpu']}",
        "columns": ["hidden size", *(f"rows: {r}" for r in rows), f"% of copy, {rows[-1]} rows"],
        "rows": [
            [size, *(times(cells[size, r]["us"]) for r in rows), shares[size]] for size in sizes
        ],
        "note": "In brackets `rmsnorm_quantize`, which has no transform, and `rmsnorm` then "
        f"`hadamard_quantize` (at {result['environment']['commit'][:10]}).",
    }


def solver_summary(result: dict) -> dict:
    """A file of run_solvers.py as one row a solver."""

    def cells(row: dict) -> list:
        over_gptq, recovered = row["error_over_gptq"], row.get("recovered")
        return [
            row["setting"],
            row["ppl"],
            row["kl"],
            row["mean_layer_error"],
            over_gptq and over_gptq["mean"],
            over_gptq and over_gptq["worst"],
            None if recovered is None else 100 * recovered,
            round(row["seconds"], 1),
        ]

    kind = "rotated" if result["rotations"] else "not rotated"
    return {
        "table": "solvers",
        "title": f"{result['model']}: weights of {result['bits']} bits a channel, {kind}",
        "columns": [
            *("solver", "PPL", "KL", "layer error", "over GPTQ's, mean", "worst layer"),
            *("regained, %", "seconds"),
        ],
        "rows": [cells(row) for row in result["rows"]],
        "note": f"Float model behind the same prefix: {result['float_ppl']:.2f}.",
    }


def finetune_summary(results: list[dict]) -> list[dict]:
    """All files of run_finetune.py of one protocol as one table: each float model once, then a row
    a phase."""
    tables: dict[str, dict] = {}
    for result in results:
        for run, row in zip(result["runs"], result["rows"], strict=True):
            setting, prefix, phase, *figures = row
            recipe = run.get("recipe", {})
            tuning = recipe.get("finetune")
            epochs = extras = ""
            if tuning:
                four_bit = recipe["scheme"]["activation_bits"] == 4
                marks = {
                    "mixed": tuning.get("e2e_mix"),
                    "generated": tuning.get("e2e_generated"),
                    "averaged": tuning.get("e2e_average"),
                    "centred": recipe.get("centre"),
                    "keys too": recipe.get("centred_keys"),
                    "R5": four_bit and recipe.get("r5_block_size", 1) != 1,
                    "R6": four_bit and recipe.get("r6", False),
                }
                parts = [f"{tuning['epochs']} + {tuning['e2e_epochs']}"]
                epochs = ", ".join(parts + [mark for mark, set_ in marks.items() if set_])
                trained = {"e2e_norms": "norms", "e2e_prefix": "prefix"}
                extras = ", ".join(name for key, name in trained.items() if tuning[key])
            table = tables.setdefault(
                result["title"],
                {
                    "table": "finetune",
                    "title": result["title"],
                    "columns": ["setting", "prefix", "epochs", "phase", *result["columns"][3:]],
                    "rows": [],
                    "note": result["note"] + " Epochs: of Block-AP + end to end; the latter trains "
                    "norms and the prefix's K/V too where its row says so; where that is mixed, it "
                    "strings the samples together anew every epoch and cuts them elsewhere; where "
                    "generated, the float model writes half of every epoch's samples; where "
                    "averaged, it keeps the running mean of what it trains. Rows that do not say "
                    "centred are of before means were taken out; keys too: also that of the keys; "
                    "R5: o_proj's input is rotated across heads; R6: in place of R1.",
                },
            )
            label = phase + (f" ({extras} too)" if extras and phase.startswith("then") else "")
            line = [setting, prefix, epochs, label, *figures]
            if line not in table["rows"]:
                table["rows"].append(line)
    for table in tables.values():
        table["rows"].sort(key=lambda row: (row[0] != "FLOAT", row[0]))
    return list(tables.values())


def finetune_best(table: dict) -> dict:
    """Of `finetune_summary`, the training of each setting that ended best, and the float models
    behind the same prefixes."""
    trained: dict[tuple, list[list]] = {}
    for row in table["rows"]:
        if row[0] != "FLOAT":
            trained.setdefault((row[0], row[1], row[2]), []).append(row)
    best: dict[tuple, list[list]] = {}
    for (setting, *_), rows in trained.items():
        if setting not in best or rows[-1][4] < best[setting][-1][4]:
            best[setting] = rows
    prefixes = {row[1] for rows in best.values() for row in rows}
    floats = {row[1]: row for row in table["rows"] if row[0] == "FLOAT" and row[1] in prefixes}
    rows = [*floats.values(), *(row for rows in best.values() for row in rows)]
    note = (
        "KL divergence and top-1 agreement are against the float model behind the verified prefix."
    )
    return {**table, "table": "finetune-best", "rows": rows, "note": note}


_ENGINE_CASES = {  # label -> (case, key)
    "prefill 1 x 512": ("decode-1x512", "prefill_ms"),
    "prefill 1 x 2048": ("prefill-1x2048", "prefill_ms"),
    "prefill 16 x 512": ("decode-16x512", "prefill_ms"),
    "prefill 8 x 2048": ("prefill-8x2048", "prefill_ms"),
    "decode 1 x 512": ("decode-1x512", "decode_ms"),
    "decode 16 x 512": ("decode-16x512", "decode_ms"),
    "decode 16 x 8192": ("decode-16x8192", "decode_ms"),
}


def engine_comparison(result: dict) -> list[list]:
    """Rows of shape, case, our ms, the peer's, their ratio, the floor of the bytes read, GB."""

    data = Engine(result)
    rows = []
    for shape in dict.fromkeys(row["shape"] for row in data.rows):
        for label, (case, key) in _ENGINE_CASES.items():
            ours = data.best_row(shape, case, key, "prefixquant W4A8KV4")
            peer = data.best_row(shape, case, key, "transformers")
            if ours is None:
                continue
            floor = sum(ours["step_bytes"].values()) / result["read_bytes_per_second"] * 1e3
            rows.append(
                [
                    shape,
                    label,
                    ours[key],
                    peer and peer[key],
                    peer and peer[key] / ours[key],
                    floor if key == "decode_ms" else None,
                    ours["memory_gb"],
                    peer and peer["memory_gb"],
                ]
            )
    return rows


def engine_summary(result: dict) -> dict:
    """An ``engine`` file as one row a case: the quicker of our heads beside the peer."""
    return {
        "table": "engine-speedup",
        "title": f"Generation, W4A8KV4 beside transformers' compiled FP16, "
        f"{result['environment']['gpu']}, random weights",
        "columns": [
            *("shape", "batch x context", "ms", "transformers, ms", "speedup"),
            *("floor, ms", "GB", "transformers, GB"),
        ],
        "rows": [
            [*row[:2], *(_three_digits(v) for v in row[2:])] for row in engine_comparison(result)
        ],
        "note": "Of a decode step, or of a prefill. Floor: the bytes of weights, lm_head and cache "
        "that a step must read, at the measured read bandwidth. Empty: not measured. "
        f"{result['note']}",
    }


def engine_chart(result: dict) -> str:
    bars = {row[1]: row[4] for row in engine_comparison(result) if row[4]}
    gpu = result["environment"]["gpu"]
    return speedup_bars(bars, f"Llama-3-8B over transformers' compiled FP16, {gpu}")


def charts(folder: Path) -> dict[Path, str]:
    """Chart files and what they should hold."""
    found = {p: json.loads(p.read_text(encoding="utf-8")) for p in folder.rglob("engine.json")}
    return {p.with_suffix(".svg"): engine_chart(result) for p, result in found.items()}


def load_results(folder: Path) -> list[dict]:
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.rglob("*.json"))]
    found = [r for r in found if isinstance(r, dict)]
    tuned = [r for r in found if r.get("table") == "finetune"]
    summaries = finetune_summary(tuned)
    results = [r for r in found if "table" in r and r not in tuned] + summaries
    results += [finetune_best(table) for table in summaries]
    results += [solver_summary(r) for r in found if r.get("experiment") == "weight-only solvers"]
    transforms = [r for r in found if str(r.get("title")).startswith(_RMSNORM_HADAMARD)]
    results += [rmsnorm_hadamard_summary(r) for r in transforms]
    results += [engine_summary(r) for r in results if r["table"] == "engine"]
    return results + [gemm_summary(r) for r in results if r["table"] == "gemm_w4"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    arguments = parser.parse_args()
    folder = ROOT / "benchmarks" / "results"
    results = load_results(folder)
    wanted = {p: update(p.read_text(encoding="utf-8"), results) for p in DOCUMENTS} | charts(folder)
    stale = False
    for path, after in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == after:
            continue
        stale = True
        if arguments.check:
            print(f"{path.name} differs from benchmarks/results: run benchmarks/update_readme.py")
        else:
            path.write_text(after, encoding="utf-8")
    return int(stale and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
