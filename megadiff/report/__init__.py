"""A report about runs as one HTML page.

`run_record` reads a run's files without changing them, `run_charts` and `run_tables` turn the records into
charts and tables, and `page` puts these together.
"""
