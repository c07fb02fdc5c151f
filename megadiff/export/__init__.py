"""A training checkpoint to a Hugging Face folder and back, one tensor at a time, on one CPU process."""
