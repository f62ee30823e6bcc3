"""An OpenAI-compatible server whose models reason: every method before a model's name is a model of its own.

In reading order: `failures` (errors as OpenAI writes them), `protocol` (requests), `answers` (whole and in pieces),
`streaming` (progress and answers as server-sent events, and clients that leave), `upstream` (another server that has
the plain models), `in_process` (a plain model in this process), `app` (the paths). Beside it stands `harness`: models
for lm-evaluation-harness.
"""
