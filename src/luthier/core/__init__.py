"""What everything stands on; loads neither torch nor transformers.

Reading order: errors (what a user sees when something is wrong), files (atomic writes, hashes), config (strict YAML
to dataclass), checks (of settings), run (the run folder), console (terminal), env (what machine is this), seeds
(hashing, no global state), stats (intervals and units), native (C code, compiled at first use).
"""
