"""The one training loop, for one process or a cluster. What is trained, and on what, comes from the methods.

Reading order: schedule (learning rate), objectives (summed cross-entropy), precision (fp32 masters, bf16 compute), muon
(an optimizer), parallel (ranks, FSDP2), sequence_parallel (rows that ranks compute together), state (everything that a
resume needs), meters (tokens/s, MFU), evaluate (bits per byte), prepare (from text to token shards and held-out
streams), loop (ties them together). Stages on Hugging Face trainers have tuning_config (what they share) and tuning
(run folders, resume, the paper's learning rates).
"""
