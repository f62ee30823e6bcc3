"""Text in, batches out: where documents come from, how they become tokens, and in which order a model sees them.

Reading order: files (UTF-8 files, or an error that says where they are not), formats (rows of five kinds), python_prose
(the corpus that every Python installation carries), sources (documents), row_source (rows to learn from), template (the
chat format), tokenizer (byte-level BPE), chat (the loss mask), replies (the same in any template), preferences (pairs
of them), shards (tokens on disk), mixture (which window comes when), packing (short documents in full rows),
token_bytes (which bytes a token stands for), compressors (the incumbents, in bytes), problems (graded in length, with
certain answers), word_problems (questions that a program verifies), word_templates (their wording), stories (text from
templates), curriculum (rows for a whole life of a model), contamination (what texts and tests share), long_documents
(facts in filler text); grammar (sentences with exact word probabilities), known (what a source of known entropy is),
known_chains (chains, n-grams, hidden states), known_sources (all eight, by name).
Nothing here loads torch; only tokenizer loads transformers, when it trains or loads one.
"""
