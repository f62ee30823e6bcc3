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


def test_package_first_then_every_auto_class(folder: Path) -> None:
    run(
        "import sys, luthier\n"
        "from luthier.models.register import register_when_transformers_loads\n"
        "register_when_transformers_loads()\n"
        "assert sum(type(finder).__module__.startswith('luthier') for finder in sys.meta_path) == 1\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'registration is not light'\n"
        "import transformers.modeling_layers\n"  # pulls the Auto tables in while half imported itself
        "assert not any(type(finder).__module__.startswith('luthier') for finder in sys.meta_path)\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert type(model).__module__ == 'luthier.models.instella', type(model)\n"
        "assert model.model.rotary_emb.inv_freq.abs().min() > 0\n"
        "assert type(AutoModel.from_config(model.config)).__name__ == 'InstellaModel'\n"
    )


def test_transformers_first(folder: Path) -> None:
    run(
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "import luthier\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert type(model).__module__ == 'luthier.models.instella', type(model)\n"
    )


def test_config_only(folder: Path) -> None:
    run(
        "import luthier\n"
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(folder)!r})\n"
        "assert type(config).__module__ == 'luthier.models.instella_config', type(config)\n"
    )


def test_several_actions_wait_for_one_module() -> None:
    run(
        "import sys\n"
        "from luthier.models.register import run_after_import\n"
        "assert 'colorsys' not in sys.modules\n"
        "seen = []\n"
        "first, second = lambda: seen.append(1), lambda: seen.append(2)\n"
        "for action in (first, second, first):\n"
        "    run_after_import('colorsys', action)\n"
        "import colorsys\n"
        "assert seen == [1, 2], seen\n"
    )
