"""Training on many devices: process groups (`topology`), the objective on vocabulary shards, and the pipeline step."""
