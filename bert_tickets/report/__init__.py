"""Results, tables and figures of finished runs.

`results` reads run directories into one table of levels, `cells` pools it over seeds and compares rows by `significance`,
`tables` and `transfer` choose cells and name missing runs, `formats` writes tables, `figures` and `pictures` draw. `published`
has the paper's numbers.
"""
