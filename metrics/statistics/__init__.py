"""What scores of a few prompts say about all prompts: intervals, tests against a margin, sample sizes. Numbers only.

clusters         values of one prompt are one observation, because seeds of a prompt resemble each other
intervals        bootstrap interval of a mean
non_inferiority  is a mean, or a share of prompts, below a limit; p values whose size holds for skewed losses
holm             several p values at one error rate
verdict          PASS, FAIL or INCONCLUSIVE
sample_sizes     how many prompts a test needs
"""
