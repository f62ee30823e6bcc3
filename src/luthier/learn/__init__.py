"""The one training loop, for one process or a cluster. What is trained, and on what, comes from the methods.

Reading order: schedule (learning rate), objectives (summed cross-entropy), precision (fp32 masters, bf16 compute),
parallel (ranks, FSDP2), state (everything that a resume needs), meters (tokens/s, MFU), evaluate (bits per byte),
loop (ties them together).
"""
