"""Conversion between training checkpoints and Hugging Face folders, one tensor at a time, in one CPU process.

`export` writes a folder from a checkpoint of any layout, and `importing` does the reverse; `verify` compares an
exported folder with the trainer's model. `huggingface` holds the code that ships in every exported folder.
"""
