"""Corpus to clean rows: documents, tokenizers, indexed files, blends, packed rows, loader."""
