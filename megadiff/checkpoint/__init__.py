"""State dicts to disk and back: save, load, manifest."""
