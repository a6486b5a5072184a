"""The scripts that run inside Redis; `prelude.lua` comes before each."""
