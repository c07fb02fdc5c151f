"""Many devices: topology, the objective on vocabulary shards, the pipeline step."""
