"""Checks of a machine or cluster, which tools/check_setup.py runs."""
