"""Results, tables and figures of finished runs.

`results` reads run directories into one table of levels, whose rows `rows` names, `cells` pools it over seeds and compares rows
by `significance`, `tables`, `transfer` and `tamt` choose cells and name missing runs, `formats` writes tables, `figures`,
`tamt_figures` and `pictures` draw. `published` has the papers' numbers.
"""
