# SPDX-License-Identifier: Apache-2.0
"""Registers our quantizer with transformers, at once or when transformers is first imported.

transformers finds quantizers in two dictionaries and has no entry points. `import prefixquant` must
not import transformers (it takes a second and every ``--help`` would wait for it), so where
transformers is not loaded yet, its quantizer registry is completed the moment it is.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


class _RegisterAfter(importlib.abc.Loader):
    """Executes a module with its own loader, then registers."""

    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str):  # whatever else a loader can do (get_source, ...)
        return getattr(self._loader, name)


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds one module, where everybody else would find it, and gives it the loader above."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def _register() -> None:
    # The module registers itself; if it is what asked for the registry, it is half imported here
    # and will do so at its end.
    importlib.import_module("prefixquant.integrations.transformers")


def register_with_transformers() -> None:
    """Makes ``quant_method: "prefixquant"`` known to transformers; safe to call again."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
