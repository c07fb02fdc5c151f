"""Evaluation of trained models: the validation ELBO, likelihoods of texts, and the interface to lm-evaluation-harness.

`validation` evaluates the bound during training with fixed noise. `likelihood` has the likelihoods of texts and the
estimators of them that training methods offer, over the integrals of `effective_count`; `texts_likelihood` applies them
to files of texts, and `harness` serves them and continuations to the harness.
"""
