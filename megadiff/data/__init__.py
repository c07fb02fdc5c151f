"""The data pipeline, from corpus files to batches of clean token sequences.

Corpora are tokenized into indexed files (`preprocess`, `indexed_writer`, and `shards` for many processes), which
`open` checks and `sequences` divides into sequences of fixed length. A mixture (`mixture`) decides which source each
sample comes from, and `loader` serves the sequences of each step to a data-parallel rank.
"""
