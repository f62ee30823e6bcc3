"""Instella, arXiv 2511.10628: the open recipe of a small model. Files are in the order of a model's life.

Reading order: config (the knobs), plan (what a run will cost), start (what a run begins with), pretrain (stages 1 and
2), soup_config and soup (the mean of models), extend_config and extend (a longer context), tuning_configs (the knobs of
the stages after it), sft, measured (once, with the starting weights), dpo, policy_loss, marking (verified rewards),
rollouts, math_trainer and mathrl. Questions on long documents: long_qa. Text becomes token shards in learn/prepare,
which other methods use too. Data on the side: programs, synthetic problems that a program verifies, with
program_config, program_prompts, program_numbers and program_values (numbers tied to their places, and what they may
become), program_source (what may run), sandbox and sandbox_child (where it runs), and program_records (what became of
each problem).
"""
