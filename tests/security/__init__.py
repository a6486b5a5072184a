"""What a gateway withstands: every test is an attack."""
