"""Checkpoints: saving, loading, and the manifest that describes them.

`save` copies a rank's state to host memory, writes it beside training and completes it with one rename, and
`load` reads a checkpoint of any layout back. `folder` knows which checkpoints of a run exist and are complete.
"""
