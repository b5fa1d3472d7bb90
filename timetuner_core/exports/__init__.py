"""Exports of a tuned schedule to other programs, each of which says what it cannot carry."""
