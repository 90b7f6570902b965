"""Fuzzers of everything a user can give a file for."""
