"""Instella, arXiv 2511.10628: the open recipe of a small model. Files are in the order of a model's life.

Reading order: config (the knobs), prepare (text to token shards), plan (what a run will cost), pretrain (stage 1).
"""
