"""How long asv looks at a benchmark: a few samples each, so that a whole run stays within minutes."""


class Sampled:
    warmup_time = 0.02
    rounds = 1
    repeat = (2, 10, 0.2)
    sample_time = 0.005
