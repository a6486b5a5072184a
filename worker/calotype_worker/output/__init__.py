"""From finished pixels to stored pictures: encoding with provenance, and upload."""
