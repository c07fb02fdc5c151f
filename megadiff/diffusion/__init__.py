"""The mathematics on one device: rates, mixing, noising, conditioning, objective."""
