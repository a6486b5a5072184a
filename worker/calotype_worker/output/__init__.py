"""From finished pixels to stored images: encoding with provenance, and upload."""
