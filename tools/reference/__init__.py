"""The pages of docs/reference, made from the code they describe: `python -m tools.reference` writes them."""
