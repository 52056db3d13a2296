"""Short scripts to copy and change, each run from the repository's root: python -m examples.NAME"""
