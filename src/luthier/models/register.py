"""Tell transformers' Auto classes about our models, without importing transformers or torch before the user does.

Two steps, each at the first moment at which it is free: the configurations when transformers' own table of
configurations has been imported, the model classes when the first such configuration exists (every path to a model
goes through one). No remote code is involved, so `trust_remote_code` is never needed.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

CONFIG_TABLE = "transformers.models.auto.configuration_auto"


def register_when_transformers_loads() -> None:
    """Register the configurations now if transformers' table is loaded, else right after it loads."""
    run_after_import(CONFIG_TABLE, register_config)


def run_after_import(module: str, action: Callable[[], None]) -> None:
    """Call `action` now if the module is loaded, else right after it loads; once, however often it is asked for."""
    if module in sys.modules:
        action()
        return
    waiting = next((finder for finder in sys.meta_path if isinstance(finder, _AfterImport)), None)
    if waiting is None:
        waiting = _AfterImport()
        sys.meta_path.insert(0, waiting)
    actions = waiting.actions.setdefault(module, [])
    if action not in actions:
        actions.append(action)


def register_config() -> None:
    """Make `AutoConfig` read our model types. Imports transformers; a class of theirs would be replaced."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from luthier.models.instella_config import InstellaConfig
    from luthier.models.mixer_config import MixerConfig

    AutoConfig.register("instella", InstellaConfig, exist_ok=True)
    AutoConfig.register("masked_mixer", MixerConfig, exist_ok=True)


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


@functools.cache
def register_mixer() -> None:
    """Make `AutoModel` and `AutoModelForCausalLM` build masked mixers. As `register_model`."""
    if importlib.util.find_spec("torch") is None:
        return
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from luthier.models.mixer import MixerForCausalLM, MixerModel
    from luthier.models.mixer_config import MixerConfig

    AutoModel.register(MixerConfig, MixerModel, exist_ok=True)
    AutoModelForCausalLM.register(MixerConfig, MixerForCausalLM, exist_ok=True)


class _AfterImport:
    """Import finder that waits for some modules, runs actions after each, and leaves after the last."""

    def __init__(self) -> None:
        self.actions = dict[str, list[Callable[[], None]]]()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.actions:
            return None
        actions = self.actions.pop(name)
        if not self.actions:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            for action in actions:
                action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
