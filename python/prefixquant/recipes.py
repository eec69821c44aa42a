# SPDX-License-Identifier: Apache-2.0
"""recipe.yaml: the choices of a `quantize` run, as it writes them and ``--recipe`` reads them."""

import dataclasses
from pathlib import Path
from typing import Any

from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.errors import UserError


def from_options(
    context: Any,
    path: Path | None,
    choices: dict[str, Any],
    finetune: dict[str, Any],
    calibration: str,
) -> tuple[RecipeConfig, str]:
    """The recipe and the calibration text of the options, over those of recipe.yaml.

    Args:
        context: of the command; it knows which options were given.
        path: recipe.yaml, or None.
        choices: field of `RecipeConfig` -> value of the option of the same name.
        finetune: field of `FinetuneConfig` -> value; its ``samples`` is ``--train-samples``.
        calibration: the value of ``--calib``.
    """
    if path is not None:
        data = read_recipe(path)
        calibration = _chosen(context, "calib", calibration, data.pop("calib", calibration))
        inner = data.pop("finetune", {})
        choices = {**data, **_options_over(context, choices, data)}
        finetune = {**inner, **_options_over(context, finetune, inner)}
    scheme = Scheme.parse(choices["scheme"])
    tuning = FinetuneConfig(**finetune)
    return RecipeConfig(**{**choices, "scheme": scheme, "finetune": tuning}), calibration


def _options_over(context: Any, options: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _chosen(context, name, value, data.get(name, value))
        for name, value in options.items()
    }


def _chosen(context: Any, name: str, option: Any, from_file: Any) -> Any:
    parameter = "train_samples" if name == "samples" else name
    given = context.get_parameter_source(parameter)
    return option if given is not None and given.name == "COMMANDLINE" else from_file


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping of a recipe.yaml, its keys and types checked against `RecipeConfig`.

    Raises:
        UserError: not readable, not YAML, an unknown key or a value of another type.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"--recipe {path}: cannot be read ({reason})") from error
    if not isinstance(data, dict):
        raise UserError(f"--recipe {path}: expected a mapping of choices")
    data.pop("model", None)  # the model is named on the command line
    defaults = {**_defaults(RecipeConfig()), "scheme": "", "calib": ""}
    inner = data.get("finetune", {})
    if not isinstance(inner, dict):
        raise UserError(f"--recipe {path}: finetune expected a mapping")
    _check(path, {k: v for k, v in data.items() if k != "finetune"}, defaults)
    _check(path, inner, _defaults(FinetuneConfig()))
    return data


def _defaults(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _check(path: Path, data: dict[str, Any], defaults: dict[str, Any]) -> None:
    for name, value in data.items():
        if name not in defaults:
            raise UserError(f"--recipe {path}: unknown key {str(name)!r}")
        default = defaults[name]
        if default is None:  # a text or nothing
            fits = value is None or isinstance(value, str)
        elif isinstance(default, float):
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            fits = type(value) is type(default)
        if not fits:
            raise UserError(
                f"--recipe {path}: {name} expected {type(default).__name__}, got {value!r}"
            )


def write_recipe(report: dict[str, Any]) -> str:
    """recipe.yaml of a `quantize` report: every choice spelled out."""
    import yaml

    from prefixquant.report import plain

    choices = {"model": report["model"], "calib": report["calibration_text"], **report["recipe"]}
    made_by = f"# What made this checkpoint, by {report['quantization']['producer']}.\n"
    return made_by + yaml.safe_dump(plain(choices), sort_keys=False, allow_unicode=True)
