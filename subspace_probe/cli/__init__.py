"""The command `subspace-probe`: one file per verb. It asks, calls the library and prints; it computes nothing.

Modules here import nothing heavy at the top, so that `--help` answers at once.
"""
