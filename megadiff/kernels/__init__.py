"""The output head and the objective in one: no [tokens, vocabulary] array is ever whole."""
