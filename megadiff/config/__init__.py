"""How a run is described: YAML and overrides to one frozen, typed tree; folders as registries."""
