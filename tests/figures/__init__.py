"""Measures the rows of the README's tables that `rustllama bench` alone cannot: `python -m tests.figures --help`.

Each command starts servers of its own, prints what it finds as it goes, and asserts nothing: figures belong to the
machine they were measured on.
"""
