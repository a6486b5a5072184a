"""Tests: `unit` needs no server, `integration` runs real servers and real processes."""
