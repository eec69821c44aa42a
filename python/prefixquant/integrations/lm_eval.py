# SPDX-License-Identifier: Apache-2.0
"""Tasks of the LM evaluation harness (lm_eval 0.4.13) on checkpoints and float models.

One rule for every model: no BOS is put in front of a text (``add_bos_token=False``), as in the
papers. A checkpoint brings its own in the hidden prefix; the float model is measured without one,
in the same process by the same code. This is not the perplexity protocol of `workflow.evaluate`,
and lm_eval's own ``wikitext`` is yet another: the three are not to be mixed.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixquant.errors import UserError
from prefixquant.progress import SILENT, Progress

# The five tasks of the papers; --tasks zero-shot names them all.
ZERO_SHOT = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
# What a task may report of a multiple choice or of a text, in the order of the table.
_METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity", "byte_perplexity")


def task_names(option: str) -> list[str]:
    """``"piqa,arc_easy"`` or ``"zero-shot"`` as names."""
    names = [name.strip() for part in option.split(",") for name in [part] if name.strip()]
    if not names:
        raise UserError(f"--tasks: expected names of tasks, got {option!r}")
    return [n for name in names for n in (ZERO_SHOT if name == "zero-shot" else (name,))]


def evaluate_tasks(
    models: Mapping[str, tuple[Any, Any]],
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Runs the tasks on every model.

    Args:
        models: name -> (model, tokenizer).
        tasks: names that lm_eval knows, or those of the YAML files in ``folder``.
        folder: further tasks; their data may be local, then nothing is downloaded.
        limit: the first documents of each task only; for trying things out.

    Returns:
        ``results``: model -> task -> metric -> value (a ``_stderr`` beside each); ``average``:
        model -> mean of ``acc``; ``protocol``.

    Raises:
        UserError: lm_eval is not installed, or a task or its data cannot be found.
    """
    with _quiet():
        harness, manager = _harness(folder)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if unknown:
            raise UserError(
                f"--tasks: lm_eval knows no task {unknown[0]!r}"
                + (f" and {folder} holds none" if folder else "; is a --task-folder missing?")
            )
        results = {}
        for name, (model, tokenizer) in models.items():
            with progress.stage(f"tasks on {name}"):
                results[name] = _run(
                    harness, manager, model, tokenizer, list(tasks), shots, limit, batch_size
                )
    return {
        "results": results,
        "average_acc": {name: _average(r) for name, r in results.items()},
        "protocol": {
            "harness": f"lm_eval {harness.__version__}",
            "tasks": list(tasks),
            "num_fewshot": shots,
            "limit": limit,
            "add_bos_token": False,
        },
    }


def _harness(folder: Path | None) -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks needs the package lm_eval ({error}); pip install 'prefixquant[eval]'"
        ) from error
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-folder {folder}: no such folder")
    return lm_eval, TaskManager(include_path=None if folder is None else str(folder))


def _run(
    harness: Any,
    manager: Any,
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    shots: int,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=False,
        backend="causal",
    )
    try:
        output = harness.simple_evaluate(
            model=wrapped,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(f"--tasks: the data of a task is missing ({error})") from error
    return {task: _metrics(output["results"][task]) for task in tasks}


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "alias": ...}`` -> ``{"acc": 0.5}``, the known metrics first."""
    plain = {
        key.split(",")[0]: value
        for key, value in result.items()
        if isinstance(value, int | float) and "," in key
    }
    known = [name for name in _METRICS if name in plain]
    return {name: plain[name] for name in [*known, *sorted(set(plain) - set(known))]}


def _average(results: Mapping[str, Mapping[str, float]]) -> float | None:
    accuracies = [r["acc"] for r in results.values() if "acc" in r]
    return sum(accuracies) / len(accuracies) if accuracies else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs its progress to the terminal; ours is shown instead."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def describe_tasks(tasks: Mapping[str, Any]) -> str:
    """A table: a row a task and metric, a column a model."""
    from prefixquant.report import table

    results = tasks["results"]
    names = list(results)
    rows = [["task", "metric", *names]]
    for task in tasks["protocol"]["tasks"]:
        metrics = [m for m in results[names[0]][task] if not m.endswith("_stderr")]
        rows += [
            [task, metric, *(f"{results[name][task][metric]:.4f}" for name in names)]
            for metric in metrics
        ]
    if any(value is not None for value in tasks["average_acc"].values()):
        averages = [tasks["average_acc"][name] for name in names]
        rows.append(["average", "acc", *(f"{value:.4f}" for value in averages)])
    protocol = tasks["protocol"]
    limit = f", first {protocol['limit']} documents" if protocol["limit"] else ""
    return (
        table(rows)
        + f"\n{protocol['harness']}, {protocol['num_fewshot']} examples in front, no BOS{limit}"
    )
