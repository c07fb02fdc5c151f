"""The code that ships in every exported folder; it needs only torch and transformers, and nothing of megadiff."""
