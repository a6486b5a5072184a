"""Tests against a real Valkey, a real S3 server and real worker processes."""
