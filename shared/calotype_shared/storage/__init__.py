"""Objects in S3-compatible storage, and uploaded images."""
