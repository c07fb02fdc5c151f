"""Corpora that many processes tokenize together, each its own parts, into a folder of shards that is read as one file.

`plan` cuts the input into units by a rule of the inputs alone, and `ledger` is the folder that records what is done
and who makes what. `work` makes shards in one process or a local pool, and `finish` writes the index
of all shards, or one `.bin` of them, byte for byte what one process would have written.
"""
