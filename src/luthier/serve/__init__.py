"""An OpenAI-compatible server whose models reason: every method before a model's name is a model of its own.

In reading order: `protocol` (requests and answers as OpenAI writes them), `failures` (errors as OpenAI writes them),
`upstream` (where the plain models are), `streaming` (progress and answers as server-sent events, and clients that
leave), `app` (the paths).
"""
