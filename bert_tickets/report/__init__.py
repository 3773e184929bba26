"""Results, tables and figures of finished runs.

`results` reads run directories, `cells` groups their levels by what was trained, `matching` and `significance` compare them,
`tables` and `transfer` choose cells and name missing runs, `formats` writes tables, `figures` draws. `published` has the paper's
numbers.
"""
