"""Commands of `lorot` whose options would fill `cli.py`. They import no torch, and nothing else that is slow."""
