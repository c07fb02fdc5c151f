"""Evaluation of trained models: the validation ELBO, likelihoods of texts, and the interface to lm-evaluation-harness.

`validation` evaluates the bound during training with fixed noise. `estimators` has the estimators of likelihoods that
training methods offer, over the sums of `likelihood` and `effective_count`; `texts_likelihood` applies them to files of
texts, and `harness` serves them and continuations to the harness.
"""
