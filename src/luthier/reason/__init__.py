"""Reasoning at inference time: Socratic Self-Refine and its baselines, for any model behind a backend.

In reading order: `config` (every setting), `prompts` (all wording), `replies` (reading what models write), `trace` (the
record of a problem), `session` (one problem's calls, budget and proposals), `votes` (answers grouped by meaning),
`checkers` (programs that vote), `statements` (what they read of zebra puzzles), `steps` (decompose, re-solve,
confidence, select, refine), `lines` (the same with lines for steps), `ssr` (SSR-Lin, SSR-Ada, SSR-Plan), `sampling`
(one chain, majority, best of n), `critique` (Self-Refine, debate), `atom` (Atom of Thoughts), `mctsr` (Monte Carlo tree
self-refine), `methods` (all of them by name, and `solve`), `simulation` (a solver with known habits, for checking the
methods), `lessons` (what teaches a small model to be such a solver).

Nothing here knows the right answer: a method sees the question and what models say.
"""
