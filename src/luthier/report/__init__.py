"""One self-contained HTML file from a run folder, a recipe folder, a folder of runs or a trace; torch-free.

Reading order: record (what a folder holds), curves (rows to numbers worth drawing), figures (rows to SVG), layers
(of quantized models), axes (lines and labels), svg (colors that follow the page, ids that do not clash), tables,
sections (the table of what a report shows), compare, html (the page); spans (trace files as trees), rounds (steps,
votes and changes of a problem), waterfall (when each call ran), traces (their page); heat_map (a text colored by its
bits).

To add a section: write a function `Record -> str` and name it in `sections.SECTIONS`.
"""
