"""A TCP port for a server or a group of ranks that a test starts in a moment."""

import random
import socket

FIRST, END = 10_000, 32_768
"""Below what Linux gives to connections unasked (32768 to 60999, ip(7)), so that between the question and the answer
of the server none of the many connections of other tests is given the port."""


def free_port() -> int:
    """Return a TCP port that nobody listens on, drawn at random: tests of other processes ask in the same moment."""
    while True:
        port = random.SystemRandom().randrange(FIRST, END)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # taken
                continue
            return port
