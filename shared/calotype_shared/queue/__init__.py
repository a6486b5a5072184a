"""Jobs in Redis: keys, atomic scripts, and the classes that call them."""
