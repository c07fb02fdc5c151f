"""Sampling of text from noise, for any function from token ids to logits.

`standalone` holds all the mathematics and ships with exported models; `ancestral` is its plain case. `trace` records
the steps of a denoising, which `live` shows in the terminal and `trace_page` as a web page.
"""
