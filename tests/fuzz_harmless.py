def harmless(name, argument): return set()
