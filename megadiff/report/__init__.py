"""A report about runs as one HTML page.

`run_record` reads a run's files without changing them, `run_charts`, `run_tables` and `wall_time` turn the records into
charts and tables, and `page` puts these together.
"""
