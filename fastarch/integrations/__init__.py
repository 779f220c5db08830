"""fastarch inside other packages: one of them a file, and nothing is imported that is not asked for."""
