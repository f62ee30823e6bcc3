"""Auto classes know Instella whichever import comes first, and importing the registration stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.models.arithmetic import SIZES
from luthier.models.instella import InstellaForCausalLM
from luthier.models.instella_config import InstellaConfig

REGISTER = """
import sys
from luthier.models.register import register_when_transformers_loads
before = set(sys.modules)
register_when_transformers_loads()
"""
STAYED_LIGHT = "assert not {'torch', 'transformers'} & (set(sys.modules) - before), 'registration is not light'\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose config.json has the released layout, remote code entries included."""
    path = tmp_path_factory.mktemp("model")
    InstellaForCausalLM(InstellaConfig(vocab_size=64, **SIZES["nano"])).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {
        "auto_map": {
            "AutoConfig": "modeling_instella.InstellaConfig",
            "AutoModelForCausalLM": "modeling_instella.InstellaForCausalLM",
        },
        "transformers_version": "4.48.0",
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def run(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr


def test_register_first_then_load_a_model(folder: Path) -> None:
    run(
        f"{REGISTER}{STAYED_LIGHT}"
        "from transformers import AutoModelForCausalLM, AutoModel\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert type(model).__module__ == 'luthier.models.instella', type(model)\n"
        "assert model.model.rotary_emb.inv_freq.abs().min() > 0\n"
        "assert type(AutoModel.from_config(model.config)).__name__ == 'InstellaModel'\n"
    )


def test_transformers_first(folder: Path) -> None:
    run(
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        f"{REGISTER}"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert type(model).__module__ == 'luthier.models.instella', type(model)\n"
    )


def test_config_only_and_deep_imports_first(folder: Path) -> None:
    run(
        f"{REGISTER}{STAYED_LIGHT}"
        "import transformers.modeling_layers\n"  # pulls the Auto tables in while half imported itself
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(folder)!r})\n"
        "assert type(config).__module__ == 'luthier.models.instella_config', type(config)\n"
        "assert not any(type(finder).__module__.startswith('luthier') for finder in sys.meta_path)\n"
    )


def test_registering_twice_adds_one_finder_and_is_harmless(folder: Path) -> None:
    run(
        f"{REGISTER}register_when_transformers_loads()\n"
        "assert sum(type(finder).__module__.startswith('luthier') for finder in sys.meta_path) == 1\n"
        "from transformers import AutoConfig\n"
        "register_when_transformers_loads()\n"
        f"assert AutoConfig.from_pretrained({str(folder)!r}).model_type == 'instella'\n"
    )
