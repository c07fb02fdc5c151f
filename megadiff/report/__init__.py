"""A report about runs as one HTML page, and data for people to read.

`run_record` reads a run's files without changing them, `run_charts` and `run_tables` turn the records into
charts and tables, and `page` puts these together. `data_page` shows statistics of sources and the
sequences of a training step, in a terminal and on a page.
"""
