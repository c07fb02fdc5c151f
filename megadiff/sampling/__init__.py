"""Sampling of text from noise, for any function from token ids to logits.

`standalone` holds all the mathematics and ships with exported models; `ancestral` is its plain case. `trace` records
the steps of a denoising and shows them in the terminal or as a web page. `sampler` is what a training method offers.
"""
