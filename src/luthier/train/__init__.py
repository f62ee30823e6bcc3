"""Instella, arXiv 2511.10628: the open recipe of a small model. Files are in the order of a model's life.

Reading order: config (the knobs), plan (what a run will cost), pretrain (stage 1). Text becomes token shards in
learn/prepare, which other methods use too.
"""
