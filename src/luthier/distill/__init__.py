"""Adversarial on-policy distillation from a black-box teacher (GAD), arXiv 2511.10643.

A student learns from a teacher's texts alone: a discriminator, trained along with it, rewards what could be theirs.

Files in reading order:

- `teacher.py`          collecting the teacher's replies, once
- `bracket_teacher.py`  a teacher whose every probability is known
- `metrics.py`          how far a student is from its teacher, with lengths matched
- `exact.py`            a student against that teacher, by exact probabilities
- `baselines.py`        what GAD has to beat: length alone, n-grams, best of N, a lower temperature
- `prompts.py`          what a judge is told
- `judge.py`            two replies compared by a third model
- `objective.py`        what the discriminator minimizes, and what its scores are turned into
- `replies.py`          both sides' replies as token ids, by one rule
- `discriminator.py`    the network
- `adversary.py`        its side of training
- `gad_config.py`       settings in the manner of TRL
- `gad_trainer.py`      GRPO against a discriminator that learns along
- `warmup.py`           the stage before it
- `gate.py`             whether the discriminator knows enough to start
- `examined.py`         what both networks do on held-out prompts, before and after
- `alarms.py`           signs that it is being gamed, and what is done then
- `auditor.py`          what two of these need measured: quality at matched lengths, and a fresh discriminator
- `distill_config.py`   settings of a whole run, torch-free
- `lessons.py`          collected rows as prompts and replies of the student
- `stages.py`           both stages inside run folders
- `toy.py`              ten classes, where everything can be computed
"""
