"""The command line of lm-evaluation-harness with luthier's models: `--model luthier --model_args pretrained=FOLDER`.

    python -m luthier.cli.lm_eval --model luthier --model_args pretrained=FOLDER --tasks hellaswag --batch_size 8

Everything else is the harness's own. It needs the package lm-eval; its data sets come from the hub.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from luthier.core.errors import MissingExtra, UserError


def main() -> int:
    """Run the harness; the exit code is 0, or 2 for an error that the user can mend."""
    try:
        harness = _harness()
        importlib.import_module("luthier.serve.harness")  # registers the name
        harness.cli_evaluate()
    except UserError as error:
        print(f"luthier: {error}\n  hint: {error.hint}", file=sys.stderr)
        return 2
    return 0


def _harness() -> Any:
    try:
        return importlib.import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        message = "this needs the package lm-eval, which is not installed"
        raise MissingExtra(message, hint="pip install lm-eval") from error


if __name__ == "__main__":
    sys.exit(main())
