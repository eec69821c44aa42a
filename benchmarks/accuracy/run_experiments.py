# SPDX-License-Identifier: Apache-2.0
"""What each part of the method is worth: experiments by name, one JSON file each.

    python benchmarks/accuracy/run_experiments.py components schemes \\
        --model M.gguf --text TEXT.txt.gz --name smollm2-135m --device cuda

Protocol as in run_protocol.py (calibration on the first 82 % of the text, perplexity over windows
of the last 18 %), by fake quantization. ``update_readme.py`` writes the tables of docs/results.md.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from prefixquant import calibrate, quantizer
from prefixquant.config import COMPENSATION
from prefixquant.doctor import environment
from prefixquant.prefix import paper_prefix
from prefixquant.report import replace_files, report_json
from prefixquant.solvers import QuantizedWeight, WeightSolver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accuracy.point_errors import PointErrors
from accuracy.workbench import Setting, Workbench, add_arguments
from provenance import commit

RESULTS = Path(__file__).resolve().parents[1] / "results" / "accuracy"

# An experiment yields rows: a label, what else the table shows, and how to get the figures.
Row = tuple[dict, Callable[[], dict]]
Experiment = Callable[[Workbench], Iterator[Row]]


def _measured(bench: Workbench, setting: Setting, patch=None, **columns) -> Row:
    return {"setting": setting.label, **columns}, lambda: bench.run(setting, patch)


@contextlib.contextmanager
def without_search():
    """Min-max scales in place of every search."""

    def head_scales(x, metric, bits, mode):
        return quantizer.minmax_scale(x.abs().amax(dim=(1, 2)), bits)

    def activation_scale(x, weights, bits, mode, companded):
        return quantizer.minmax_scale(x.abs().max(), bits, companded)

    def round_to_nearest(weight, bits):
        scale = quantizer.minmax_scale(weight.abs().amax(dim=1), bits)
        q = quantizer.quantize(weight, scale[:, None], bits).to(torch.int8)
        return QuantizedWeight(q, scale, bits)

    def solve(self, weights, bits, hessian):
        return [round_to_nearest(weight, bits) for weight in weights]

    with (
        mock.patch.object(calibrate, "search_head_scales", head_scales),
        mock.patch.object(calibrate, "search_activation_scale", activation_scale),
        mock.patch.object(WeightSolver, "__call__", solve),
    ):
        yield


def components(bench: Workbench) -> Iterator[Row]:
    """The method built up part by part (W4A4KV4)."""
    plain = Setting(
        "",
        rotate=False,
        r5=False,
        r6=False,
        balance=False,
        centre=False,
        prefix=(),
        solver="rtn",
        compensation=0,
    )
    steps = (
        ("round to nearest, min-max static scales", {}, without_search),
        ("+ rotations", {"rotate": True}, without_search),
        ("+ searched scales", {}, None),
        ("+ prefix", {"prefix": None}, None),
        ("+ balance", {"balance": True}, None),
        ("+ centre", {"centre": True}, None),
        ("+ R5", {"r5": True}, None),
        ("+ R6 in place of R1", {"r6": True}, None),
        ("+ GPTQ", {"solver": "gptq"}, None),
        ("GPTQ -> QuantEase", {"solver": "quantease"}, None),
        ("+ compensation, RTN", {"solver": "rtn", "compensation": COMPENSATION}, None),
        ("+ compensation, GPTQ", {"solver": "gptq"}, None),
        ("+ compensation, QuantEase", {"solver": "quantease"}, None),
    )
    for label, changes, patch in steps:
        plain = dataclasses.replace(plain, label=label, **changes)
        yield _measured(bench, plain, patch)


def schemes(bench: Workbench) -> Iterator[Row]:
    """Schemes with and without prefix, with and without compensation."""
    for scheme in ("w4a4kv4", "w4a8kv4", "w4a8kv8", "w8a8kv8", "w4a16kv16"):
        for name, prefix in (("no prefix", ()), ("verified prefix", None)):
            for strength in (0.0, COMPENSATION):
                label = f"{scheme.upper()}, {name}"
                setting = Setting(label, scheme, prefix=prefix, compensation=strength)
                yield _measured(bench, setting, compensation=strength)


def dynamic(bench: Workbench) -> Iterator[Row]:
    """Static scales against scales made for every token (activations; K and V by head)."""
    by_paper = paper_prefix(bench.search.steps[0], bench.search.bos)
    prefixes = (("no prefix", ()), ("verified prefix", None), ("paper's prefix", by_paper))
    for mode, scheme in (("static", "w4a4kv4"), ("dynamic", "w4a4dkv4d")):
        for name, prefix in prefixes:
            for strength in (0.0, COMPENSATION):
                setting = Setting(
                    f"W4A4KV4 {mode}, {name}", scheme, prefix=prefix, compensation=strength
                )
                yield _measured(bench, setting, compensation=strength)


def companded(bench: Workbench) -> Iterator[Row]:
    """Even and companded levels of 4-bit activations, static and dynamic."""
    by_paper = paper_prefix(bench.search.steps[0], bench.search.bos)
    for levels, mark in (("even", ""), ("companded", "c")):
        for mode, scheme, name, prefix in (
            ("static", f"w4a4{mark}kv4", "paper's prefix", by_paper),
            ("dynamic", f"w4a4{mark}dkv4d", "no prefix", ()),
        ):
            setting = Setting(f"W4A4KV4 {mode}, {name}", scheme, prefix=prefix)
            yield _measured(bench, setting, levels=levels)


def float_prefix(bench: Workbench) -> Iterator[Row]:
    """What a prefix does to the float model itself."""
    by_paper = paper_prefix(bench.search.steps[0], bench.search.bos)
    named = {
        "no prefix": (),
        "BOS": (bench.search.bos,),
        "paper's rule": by_paper,
        "verified": bench.search.prefix,
    }
    for name, ids in named.items():
        columns = {"setting": name, "prefix": bench.text_of(ids)}
        yield columns, lambda ids=ids: bench.measure(bench.float_model(ids))


def _longest(bench: Workbench) -> tuple[int, ...]:
    """Four tokens: the most frequent outlier tokens of the scan without prefix, then BOS."""
    tokens = bench.search.steps[0].before_r4.tokens.most_common()
    frequent = [token for token, _ in tokens if token != bench.search.bos]
    return (*frequent[:3], bench.search.bos)


def prefix_length(bench: Workbench) -> Iterator[Row]:
    """0 to 4 prefixed tokens: BOS, then the most frequent outlier tokens before it."""
    longest = _longest(bench)
    for count in range(len(longest) + 1):
        ids = longest[len(longest) - count :]
        for strength in (0.0, COMPENSATION):
            setting = Setting(f"{count} tokens", prefix=ids, compensation=strength)
            yield _measured(bench, setting, prefix=bench.text_of(ids), compensation=strength)


def prefix_content(bench: Workbench) -> Iterator[Row]:
    """One token in front: the found one, the most frequent of the text, random ones."""
    counts = bench.calibration().bincount()
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(len(bench.tokenizer), (3,), generator=generator).tolist()
    named = {"found": bench.search.prefix, "most frequent": (int(counts.argmax()),)}
    named |= {f"random {i}": (token,) for i, token in enumerate(random)}
    for name, ids in named.items():
        for strength in (0.0, COMPENSATION):
            setting = Setting(name, prefix=ids, compensation=strength)
            yield _measured(bench, setting, prefix=bench.text_of(ids), compensation=strength)


def eta(bench: Workbench) -> Iterator[Row]:
    """The threshold of the outlier scan, by the paper's rule and verified."""

    def found(mode: str, threshold: float) -> dict:
        search = bench.search_with(eta=threshold, mode=mode)
        scan = next(step for step in search.steps if step.prefix == search.prefix)
        return {
            "prefix": bench.text_of(search.prefix),
            "outlier tokens left": scan.quantized.tokens.total(),
        }

    for threshold in (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0):
        for mode in ("paper", "verified"):
            columns = {"setting": f"eta {threshold:g}", "mode": mode}
            yield columns, lambda m=mode, t=threshold: found(m, t)


def heads_rotation(bench: Workbench) -> Iterator[Row]:
    """R5, the rotation of o_proj's input across heads (W4A4KV4, verified prefix)."""
    for r5 in (False, True):
        yield _measured(bench, Setting("with R5" if r5 else "without", r5=r5))


def norms_rotation(bench: Workbench) -> Iterator[Row]:
    """R6 behind the norms in place of R1 (W4A4KV4, verified prefix)."""
    for balance in (False, True):
        for r6 in (False, True):
            label = f"{'R6' if r6 else 'R1'}, {'balanced' if balance else 'not balanced'}"
            yield _measured(bench, Setting(label, r6=r6, balance=balance))


def points(bench: Workbench) -> Iterator[Row]:
    """Squared errors of 4-bit activations in the outputs of what reads them, by point, in %."""
    behind = {"R5": ("o",), "R6": ("qkv", "gate_up")}
    for rotation, which in (("", ("qkv", "o", "gate_up", "down")), *behind.items()):
        errors = PointErrors(bench, r5=rotation == "R5", r6=rotation == "R6")
        for point in which:
            label = f"{point}, {rotation}" if rotation else point
            yield {"point": label}, lambda e=errors, p=point: e.figures[p]


def seeds(bench: Workbench) -> Iterator[Row]:
    """Calibration windows and rotation signs of three seeds."""
    for scheme in ("w4a4kv4", "w4a8kv4"):
        for seed in range(3):
            yield _measured(bench, Setting(f"{scheme.upper()}, seed {seed}", scheme, seed=seed))


def compensation(bench: Workbench) -> Iterator[Row]:
    """Ridge strength against the number of samples of 1024 tokens, RTN weights."""
    for samples in (8, 32, 128):
        for strength in (0.0, 0.1, 0.3, 1.0):
            setting = Setting(
                f"{samples} samples", solver="rtn", compensation=strength, samples=samples
            )
            yield _measured(bench, setting, compensation=strength)


def solvers(bench: Workbench) -> Iterator[Row]:
    """Solvers behind the same compensation, 32 and 128 samples."""
    for scheme in ("w4a4kv4", "w4a8kv4"):
        for solver in ("rtn", "gptq", "quantease"):
            for samples in (32, 128):
                label = f"{scheme.upper()}, {solver}"
                setting = Setting(label, scheme, solver=solver, samples=samples)
                yield _measured(bench, setting, samples=samples)


def calibration_text(bench: Workbench) -> Iterator[Row]:
    """Calibration on the text's own first part, and on a text of another kind (pydoc)."""
    for scheme in ("w4a4kv4", "w4a8kv4"):
        for text in (None, "pydoc"):
            for strength in (0.0, 0.3, 1.0):
                label = f"{scheme.upper()}, {text or 'same text'}"
                setting = Setting(label, scheme, compensation=strength, text=text)
                yield _measured(bench, setting, compensation=strength)


EXPERIMENTS: dict[str, Experiment] = {
    "components": components,
    "schemes": schemes,
    "dynamic": dynamic,
    "companded": companded,
    "solvers": solvers,
    "compensation": compensation,
    "calibration-text": calibration_text,
    "float-prefix": float_prefix,
    "prefix-length": prefix_length,
    "prefix-content": prefix_content,
    "eta": eta,
    "seeds": seeds,
    "r5": heads_rotation,
    "r6": norms_rotation,
    "points": points,
}


def rounded(row: dict) -> dict:
    digits = {"ppl": 2, "kl": 4, "top1": 3, "spread": 2}
    digits |= {f"{m}{c}": 2 for m in ("static", "dynamic") for c in ("", ", companded")}
    return {key: round(v, digits[key]) if key in digits else v for key, v in row.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("experiments", nargs="*", help=f"{names}; none: all of them")
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in arguments.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"experiments: expected one of {names}, got {name!r}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    bench = Workbench(arguments)
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name in arguments.experiments or EXPERIMENTS:
        rows = []
        for columns, figures in EXPERIMENTS[name](bench):
            rows.append(rounded({**columns, **figures()}))
            sys.stdout.write(f"{name}: {rows[-1]}\n")
            sys.stdout.flush()
            # After every row: a long experiment that is stopped leaves what it measured.
            save(arguments, bench, name, rows)


def save(arguments: argparse.Namespace, bench: Workbench, name: str, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    result = {
        "table": f"experiment-{name}",
        "title": f"{arguments.name}: {EXPERIMENTS[name].__doc__.strip()}",
        "columns": columns,
        "rows": [[row.get(column) for column in columns] for row in rows],
        "protocol": {**vars(bench.protocol), "windows": len(bench.windows)},
        "environment": environment(),
        "commit": commit(),
    }
    replace_files(arguments.results, {f"{arguments.name}-{name}.json": report_json(result)})


if __name__ == "__main__":
    main()
