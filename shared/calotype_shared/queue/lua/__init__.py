"""The scripts that run inside Redis; `prelude.lua` precedes each of them."""
