"""Tell transformers' Auto classes about Instella, without importing transformers or torch before the user does.

Two steps, each at the first moment at which it is free: the configuration when transformers' own table of
configurations has been imported, the model classes when the first `InstellaConfig` exists (every path to a model goes
through one). No remote code is involved, so `trust_remote_code` is never needed.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

CONFIG_TABLE = "transformers.models.auto.configuration_auto"


def register_when_transformers_loads() -> None:
    """Register the configuration now if transformers' table is loaded, else right after it loads."""
    if CONFIG_TABLE in sys.modules:
        register_config()
    elif not any(isinstance(finder, _AfterConfigTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterConfigTable())


def register_config() -> None:
    """Make `AutoConfig` read `model_type: instella`. Imports transformers; a class of theirs would be replaced."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from luthier.models.instella_config import InstellaConfig

    AutoConfig.register("instella", InstellaConfig, exist_ok=True)


@functools.cache
def register_model() -> None:
    """Make `AutoModel` and `AutoModelForCausalLM` build Instella. Imports torch; does nothing where it is missing."""
    if importlib.util.find_spec("torch") is None:
        return
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from luthier.models.instella import InstellaForCausalLM, InstellaModel
    from luthier.models.instella_config import InstellaConfig

    AutoModel.register(InstellaConfig, InstellaModel, exist_ok=True)
    AutoModelForCausalLM.register(InstellaConfig, InstellaForCausalLM, exist_ok=True)


class _AfterConfigTable:
    """Import finder that waits for one module, runs `register_config` after it, and leaves."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != CONFIG_TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register_config()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
