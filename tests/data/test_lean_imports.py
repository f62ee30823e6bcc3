from __future__ import annotations

import pkgutil
import subprocess
import sys

import luthier.data


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    modules = [f"luthier.data.{module.name}" for module in pkgutil.iter_modules(luthier.data.__path__)]
    assert "luthier.data.chat" in modules
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "tokenizers", "datasets", "pyarrow", "zstandard"} & set(loaded)
