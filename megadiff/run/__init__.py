"""A run: its configuration, what is built from it, where it resumes, and its folder."""
