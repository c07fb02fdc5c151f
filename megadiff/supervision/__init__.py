"""Noticing that a run should stop, hangs or has died, with the standard library alone: no torch, no process group.

A rank is watched by a process of its own (`watcher.py`): a thread cannot speak while the interpreter's lock is held.
"""
