"""Any model folder for lm-evaluation-harness, under the name `luthier`: loaded by luthier, without remote code.

    python -m luthier.cli.lm_eval --model luthier --model_args pretrained=FOLDER --tasks hellaswag

or, in a program of your own, `import luthier.serve.harness` before `lm_eval.simple_evaluate(model="luthier", …)`. The
harness has no other way to find models that are not its own: it reads no entry points.

Departures from the harness's own `hf`: loading is strict (a tensor that is missing is an error), the model stays on one
device, and ids that the tokenizer does not know are never generated.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from luthier.data.tokenizer import load_tokenizer, num_ids
from luthier.learn.parallel import choose_device
from luthier.models.load import load_pretrained


@register_model("luthier")
class LuthierLM(HFLM):
    """A model folder or hub id in the harness.

    pretrained: the folder. dtype: "auto" keeps the stored one. The other options are those of the harness's `hf` that
    concern a loaded model: batch_size, max_length, add_bos_token, prefix_token_id, truncation, think_end_token, ….
    Raises: CheckpointError, DataError.
    """

    def __init__(
        self, pretrained: str, *, device: str | None = None, dtype: str = "auto", batch_size: Any = 1, **options: Any
    ) -> None:
        model = load_pretrained(pretrained, device=choose_device(device or "auto"), dtype=dtype)
        tokenizer = load_tokenizer(pretrained)
        settings: Any = model.generation_config
        rows = int(next(model.get_input_embeddings().parameters()).shape[0])
        if rows > num_ids(tokenizer):
            settings.suppress_tokens = list(range(num_ids(tokenizer), rows))
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)
