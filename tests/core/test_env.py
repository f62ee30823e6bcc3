from __future__ import annotations

import json
import platform
import subprocess
import sys

import luthier
from luthier.core.env import snapshot


def test_a_snapshot_says_what_a_bug_report_needs() -> None:
    found = snapshot()
    assert found["python"] == platform.python_version()
    assert found["packages"]["luthier"] == luthier.__version__
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert found["processor"]
    assert json.loads(json.dumps(found)) == found


def test_a_snapshot_loads_no_torch_but_sees_a_loaded_one() -> None:
    code = (
        "import sys; from luthier.core.env import snapshot; found = snapshot()\n"
        "assert 'torch' not in sys.modules and 'devices' not in found and found['packages']['torch']\n"
        "class Cuda: device_count = staticmethod(lambda: 1); get_device_name = staticmethod(lambda i: f'card {i}')\n"
        "class Torch: cuda = Cuda; get_num_threads = staticmethod(lambda: 3)\n"
        "sys.modules['torch'] = Torch; found = snapshot()\n"
        "assert (found['torch_threads'], found['devices']) == (3, ['card 0'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
