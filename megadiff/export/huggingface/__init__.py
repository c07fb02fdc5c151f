"""The code that ships in every exported folder; it needs torch and transformers and nothing of megadiff."""
