"""Detection of stop requests, hangs and deaths of a run.

Only the standard library is used: no torch, no process group. Every rank is watched by a process of its own
(`watcher.py`), because a thread of the rank cannot run while another thread holds the interpreter lock.
"""
