"""The data pipeline, from corpus files to batches of clean token rows.

Corpora are tokenized into indexed files (`preprocess`, `indexed_writer`), which `open` checks and `rows` packs into
rows of fixed length. Blends (`blend`, `mixture`) decide which source each sample comes from, and `loader` serves the
rows of each step to a data-parallel rank.
"""
