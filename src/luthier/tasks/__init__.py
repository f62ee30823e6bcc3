"""Problems with known answers: finding answers in replies, grading them, and what scores mean.

In reading order: `task` (a problem, a set of problems), `answers` (the answer in a reply, and exact comparison),
`sudoku` (grids and their rules), `zebra` (puzzles and what their clues decide), `grading` (right, wrong, unparsed or
timed out), `grading_worker` (symbolic comparison in a process of its own), `math` (GSM8K, MATH, AIME and plain rows),
`puzzles` (mini sudokus, zebra puzzles), `runner` (solve a task, resumably), `metrics` (accuracy with intervals, pass@k,
maj@k, calibration).

Where texts are scored instead of written: `likelihood` (items, their files, examples before them), `text_tasks` (items
made from any text), `likelihood_metrics` (which option is chosen, how often rightly), `likelihood_runner` (score a
task, resumably). `needles` asks for facts in long documents. `catalog` finds tasks of the other sorts by name.
"""
