"""Fetching models from where people keep them: what a source offers, and its files, whatever happens on the way.

Plain blocking code for a process of its own (`pull_child`): a pull is ended by killing it, at any moment, as what is
written is on record. It speaks HTTP through `requests` alone. huggingface_hub is a fine client of one of the three
kinds of sources, but keeps a cache in a layout of its own and knows neither our records and limits nor registries; all
three kinds share what is here, which leaves two requests for Hugging Face (`huggingface`).
"""
