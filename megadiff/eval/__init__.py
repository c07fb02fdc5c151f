"""Evaluation of trained models: the validation ELBO, likelihoods of texts, and the interface to lm-evaluation-harness.

`validation` evaluates the bound during training with fixed noise. `likelihood` and `texts_likelihood` give likelihoods
of texts with standard errors, and `harness` serves both these and continuations (`continuation`) to the harness.
"""
