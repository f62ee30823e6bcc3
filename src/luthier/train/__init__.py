"""Instella, arXiv 2511.10628: the open recipe of a small model. Files are in the order of a model's life.

Reading order: config (the knobs), plan (what a run will cost), start (what a run begins with), pretrain (stages 1 and
2), soup_config and soup (the mean of models), extend_config and extend (a longer context), tuning_configs (the
knobs of the stages after it), sft. Text becomes token shards in
learn/prepare, which other methods use too.
"""
