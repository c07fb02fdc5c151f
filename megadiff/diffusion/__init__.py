"""The mathematics on one device: rates, process, noising, conditioning, objective."""
