"""The mathematics on one device: schedules, processes, weightings, noising, conditioning, objective."""
