"""What a model is worth: held-out evidence bounds."""
