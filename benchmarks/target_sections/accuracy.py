# SPDX-License-Identifier: Apache-2.0
"""Targets of accuracy: static W4A4 and W4A8, static against dynamic scales, weight solvers."""

from collections.abc import Iterator
from pathlib import Path

from target_sections.target import Target, load


def solvers(folder: Path) -> Iterator[Target]:
    """Order of the weight solvers at 3 bits a channel, and what outliers give back.

    The weights as they are decide: the solvers' papers rotate nothing. Behind rotations, whose
    weights are near Gaussian, the same figures are information.
    """
    results = [(f, True) for _, f in load(folder, "*-solvers-w3-unrotated")]
    if not results:
        yield Target("*-solvers-w3-unrotated.json", 1.0, None)
    results += [(f, False) for _, f in load(folder, "*-solvers-w3")]
    for result, decides in results:
        rows = {row["setting"]: row for row in result["rows"]}
        ppl = {name: row["ppl"] for name, row in rows.items()}
        tag = f"{result['model']}, W3 weight-only{'' if decides else ', rotated'}"
        for better, worse in (("gptq", "rtn"), ("quantease", "gptq")):
            ratio = ppl[worse] / ppl[better] if {better, worse} <= set(ppl) else None
            yield Target(f"{tag}: perplexity of {worse} over {better}", 1.0, ratio, decides=decides)
        compared = rows.get("quantease", {}).get("error_over_gptq")
        margin = 1 / compared["worst"] if compared else None
        # The objective itself: it must hold on every layer, rotated or not.
        yield Target(f"{tag}: layer error of gptq over quantease, worst layer", 1.0, margin)
        regained = rows.get("quantease-outlier:0.01", {}).get("recovered")
        regained = None if regained is None else 100 * regained
        what = f"{tag}: of quantease's loss, regained by 1 % outliers"
        yield Target(what, 50.0, regained, "%", decides=decides)


_FINE_TUNED = {"W4A4KV4": (19.5, 18.0, 22.17), "W4A8KV4": (15.4, 15.0, 16.52)}


def fine_tuned(folder: Path) -> dict[tuple[str, str], float]:
    """(setting, prefix) -> the best perplexity at the end of all phases of run_finetune.py."""
    best: dict[tuple[str, str], float] = {}
    for _, result in load(folder, "smollm2-135m-instruct-finetune-*"):
        last = {(row[0], row[1]): row[3] for row in result["rows"]}
        best |= {key: min(ppl, best.get(key, ppl)) for key, ppl in last.items()}
    return best


def fine_tuning(folder: Path) -> Iterator[Target]:
    """Fine-tuned and static, behind whichever prefix was best, on SmolLM2-135M-Instruct."""
    best = fine_tuned(folder)
    for setting, (bar, aim, official) in _FINE_TUNED.items():
        tag = f"{setting} static, prefix, fine-tuned: perplexity"
        found = [
            ppl for (name, prefix), ppl in best.items() if name == setting and prefix != "none"
        ]
        measured = min(found, default=None)
        yield Target(f"{tag} (official code: {official})", bar, measured, "", at_most=True)
        yield Target(f"{tag}, aim", aim, measured, "", decides=False, at_most=True)


_CALIBRATED = {"W4A4KV4": (30.0, 36.1), "W4A8KV4": (19.0, 20.58)}


def calibrated(folder: Path) -> Iterator[Target]:
    """Perplexity without fine-tuning, the best of the prefixes, of run_protocol.py."""
    rows = [row for _, r in load(folder, "smollm2-135m-instruct") for row in r["rows"]]
    for setting, (bar, official) in _CALIBRATED.items():
        found = [
            row[2]
            for row in rows
            if row[0].startswith(f"{setting} static") and "no prefix" not in row[0]
        ]
        tag = f"{setting} static, prefix, not fine-tuned: perplexity (official code: {official})"
        yield Target(tag, bar, min(found, default=None), "", at_most=True)


# Settings of run_finetune.py, static and dynamic, of even and of companded levels.
_PAIRS = (("W4A4KV4", "W4A4DKV4D"), ("W4A4CKV4", "W4A4CDKV4D"))
# (static?, behind a prefix?) -> the best perplexity
Best = dict[tuple[bool, bool], float]


def _by_calibration(folder: Path) -> list[Best]:
    """Of run_experiments.py, by file (one state of the method) and levels."""
    found: dict[tuple[str, str], Best] = {}
    for name in ("dynamic", "companded"):
        for _, result in load(folder, f"smollm2-135m-instruct-{name}"):
            for row in (dict(zip(result["columns"], r, strict=True)) for r in result["rows"]):
                best = found.setdefault((name, row.get("levels", "even")), {})
                key = " static," in row["setting"], "no prefix" not in row["setting"]
                best[key] = min(row["ppl"], best.get(key, row["ppl"]))
    return list(found.values())


def _by_training(folder: Path) -> list[Best]:
    """Of run_finetune.py, by levels."""
    found: list[Best] = [{} for _ in _PAIRS]
    for (setting, text), value in fine_tuned(folder).items():
        for best, pair in zip(found, _PAIRS, strict=True):
            if setting in pair:
                key = setting == pair[0], text != "none"
                best[key] = min(value, best.get(key, value))
    return found


def static_over_dynamic(folder: Path) -> Iterator[Target]:
    """The best perplexity of dynamic scales over that of static ones behind a prefix: of all that
    was measured, and of calibration alone. What was not measured with both does not count."""

    def ratio(found: list[Best], prefix: bool) -> float | None:
        wanted = (True, True), (False, prefix)
        pairs = [[best[key] for key in wanted] for best in found if set(wanted) <= set(best)]
        if not pairs:
            return None
        static, dynamic = (min(ppl) for ppl in zip(*pairs, strict=True))
        return dynamic / static

    by_calibration = _by_calibration(folder)
    everything = by_calibration + _by_training(folder)
    for prefix, name in ((False, "no prefix"), (True, "prefix")):
        what = f"W4A4KV4: perplexity of dynamic, {name}, over static, prefix"
        yield Target(
            f"{what}; the best of each", 1.0, ratio(everything, prefix), decides=not prefix
        )
        alone = ratio(by_calibration, prefix)
        yield Target(f"{what}; calibration alone", 1.0, alone, decides=False)


def accuracy(folder: Path) -> Iterator[Target]:
    yield from calibrated(folder)
    yield from fine_tuning(folder)
    yield from static_over_dynamic(folder)
    yield from solvers(folder)
